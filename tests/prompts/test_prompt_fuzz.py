"""Damaged prompt files: whatever is done to the bytes, there is no traceback, and what is missing was counted.

`PRDP_FUZZ=1000` runs so many mutations, `PRDP_FUZZ_SEED=1` others than usual; the suite runs a few.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from prdp_fast.core.errors import UserError
from prdp_fast.prompts import PromptSet, build_text_shards
from prdp_fast.prompts.curate import curate
from prdp_fast.prompts.sources import Source

COUNT, SEED = int(os.environ.get("PRDP_FUZZ", "120")), os.environ.get("PRDP_FUZZ_SEED", "")
ROWS = 30
WORDS = ("red lighthouse", "Bär, sitting", "two; cats | dogs", "大きな猫", 'the "big" one', "tab\there")


def prompts(rng: random.Random) -> list[str]:
    return [f"{rng.choice(WORDS)} with number {number}" for number in range(ROWS)]


def written(kind: str, texts: list[str], rng: random.Random, end: str) -> str:
    if kind == "txt":
        lines = texts
    elif kind == "csv":
        delimiter = rng.choice(",\t;|")
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        lines = [delimiter.join(("id", "prompt", "tag"))]
        lines += [delimiter.join((str(number), text, f"t{number}")) for number, text in enumerate(quoted)]
    elif kind == "jsonl":
        lines = [json.dumps({"id": number, "prompt": text}, ensure_ascii=rng.random() < 0.5) for number, text in enumerate(texts)]
    else:
        lines = json.dumps([{"id": n, "prompt": text} for n, text in enumerate(texts)], indent=rng.choice([None, 1])).split("\n")
    return end.join(lines) + rng.choice(["", end])


# How many rows of the file each may spoil without that being told: a byte more or less may change one prompt into another, a line
# end may make one of two.
def flip(data: bytearray, rng: random.Random) -> int:
    data[rng.randrange(len(data))] = rng.randrange(256)
    return 2


def insert(data: bytearray, rng: random.Random) -> int:
    piece = rng.choice(
        [b'"', b"'", b"\0", b"\n", b"\r", b"\r\n", b"\xff", b"\xef\xbb\xbf", b",", b"\t", b";", b"{", b"[", b"]", b"\\", b'""']
    )
    at = rng.randrange(len(data))
    data[at:at] = piece
    return 2


def delete(data: bytearray, rng: random.Random) -> int:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice([1, 1, 2, 5])]
    return 2


def cut(data: bytearray, rng: random.Random) -> int:
    del data[rng.randrange(len(data)) :]
    return ROWS  # what is not in the file cannot be counted


def double(data: bytearray, rng: random.Random) -> int:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randrange(1, 200)]
    return 2


def mix_ends(data: bytearray, rng: random.Random) -> int:
    """Some lines end as on another system: whoever appends to a file does that, and nothing is lost."""
    at = [number for number, byte in enumerate(data) if byte == ord("\n") and data[max(number - 1, 0)] != ord("\r")]
    for number in reversed(at):
        if rng.random() < 0.3:
            data[number : number + 1] = rng.choice([b"\r\n", b"\r"])
    return 0


MUTATIONS = (flip, insert, delete, cut, double, mix_ends)


ENDS = ("rest of the file", "not a JSON list", "the list breaks off")  # what is said where nothing after it could be read


def one_line(error: UserError) -> bool:
    return "\n" not in str(error)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "json"])
def test_no_traceback_and_no_quiet_loss(tmp_path: Path, kind: str) -> None:
    refused = kept = 0
    for number in range(COUNT // 4):
        rng = random.Random(f"{kind} {number}{SEED and f' {SEED}'}")
        texts = prompts(rng)
        end, encoding = rng.choice(["\n", "\r\n", "\r"]), rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"])
        data = bytearray(written(kind, texts, rng, end).encode(encoding))
        allowed, times = 0, rng.choice([0, 1, 1, 1, 2])
        for _ in range(times):
            allowed += rng.choice(MUTATIONS)(data, rng)
        if encoding == "utf-16" and times:
            allowed = ROWS  # half a character more turns all that follow into others
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(data)
        wanted = {" ".join(text.split()) for text in texts}
        try:
            rows = list(Source(kind, (path,)).rows())
        except UserError as error:
            assert one_line(error) and times  # noqa: PT017
            refused += 1
            continue
        found = {" ".join(row.text.split()) for row in rows if row.text}
        faults = sum(row.fault is not None for row in rows)
        if any(text in (row.fault or "") for row in rows for text in ENDS):
            allowed = ROWS  # told, though not how many they were
        missing = wanted - found
        assert len(missing) <= faults + allowed, (number, allowed, faults, sorted(missing)[:3], [r for r in rows if r.fault][:3])
        kept += len(found)
        if number % 10 == 0:  # the whole way to shards and back
            try:
                report = curate(Source(kind, (path,)), tmp_path / f"{number}-{kind}", evaluation=0)
            except UserError as error:
                assert one_line(error)  # noqa: PT017
                continue
            assert report["kept"] + sum(report["dropped"].values()) == report["rows"] == len(rows)
            assert len(list(PromptSet.open(tmp_path / f"{number}-{kind}", "train"))) == report["kept"]
        if kind == "txt":
            try:
                build_text_shards(path, tmp_path / f"{number}-text")
            except UserError as error:
                assert one_line(error) and allowed  # noqa: PT017
    assert kept > refused * 5
