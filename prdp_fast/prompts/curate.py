"""From a stream of rows to a directory of prompt sets: clean, without duplicates, split by hash, in flat memory.

Every prompt has a 16-byte keyed hash of its comparable text. Rows are dealt into 256 files on disk by the first byte of it, and a
file at a time is freed from duplicates and sorted; put together they are all prompts in the order of their hashes, which is a
shuffled one. So

- memory holds one file of the 256 (half a megabyte for a million prompts) and one shard, whatever the number of rows; the disk
  holds the texts once more while the sets are built;
- what a prompt's place is, its index and its set depends on what prompts there are, not on the order they came in;
- of equal prompts the first one's spelling is kept, and its metadata.

The sets are those of the drawn world: `train`; `seen_eval`, the first of `train`; `unseen_eval`, which training never draws: the
first of all, or those of a held-out source, whose prompts are taken out of `train` wherever they occur.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import clean
from prdp_fast.prompts.shards import EVAL_SIZE, FORMAT, SHARD_SIZE, TEXT_SET, write_index, write_shards
from prdp_fast.prompts.sources import Row, Source

REPORT = "build.json"
EXAMPLES = 3  # dropped rows shown for each reason
EXAMPLE_CHARS = 100
BUCKETS = 256
TOKEN_BATCH = 1024  # texts tokenised at once
_RECORD = struct.Struct("<16sBBII")  # hash, held out, part (0: none), bytes of text and bytes of metadata that follow

CountTokens = Callable[[list[str]], list[int]]


class _Kept(NamedTuple):
    digest: bytes
    held_out: bool
    part: int  # 0, or 1 + its place among the parts
    text: str
    metadata: bytes  # JSON; empty: none

    def packed(self) -> bytes:
        text = self.text.encode()
        return _RECORD.pack(self.digest, self.held_out, self.part, len(text), len(self.metadata)) + text + self.metadata


class _Tally:
    """Rows read, and those left out by reason with a few examples."""

    def __init__(self) -> None:
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.metadata: set[str] = set()  # names of what is beside the texts

    def drop(self, reason: str, text: str, row: Row | None = None) -> None:
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            note = ascii(text[:EXAMPLE_CHARS])[1:-1]  # control characters are seen, halves of surrogate pairs can be written
            shown.append(f"{row.file}:{row.number}: {note}" if row else note)

    def report(self, kept: int) -> dict[str, Any]:
        return {"rows": self.rows, "kept": kept, "dropped": dict(self.dropped.most_common()), "examples": self.examples}


def curate(
    source: Source,
    output: str | Path,
    *,
    held_out: Source | None = None,
    limits: clean.Limits = clean.Limits(),  # noqa: B008 (immutable)
    max_tokens: int | None = None,
    count_tokens: CountTokens | None = None,
    evaluation: int | None = None,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
) -> dict[str, Any]:
    """Build a prompt directory, whole or not at all.

    Args:
        source: of the training prompts.
        output: a directory that does not exist yet, or is empty.
        held_out: of the unseen prompts; None takes them out of `source` by hash.
        limits: lengths in characters.
        max_tokens, count_tokens: leave out texts of more tokens than this.
        evaluation: prompts in each of seen_eval and unseen_eval; None: 2,048, but no more than a tenth of the prompts. 0: no
            such sets.
        seed: another one holds out other prompts and shuffles otherwise.
    Returns: the report, which is also written to `output/build.json`: rows, kept, dropped by reason with examples, set sizes.
    Raises: UserError if nothing can be read, every row is dropped, or there are too few prompts for the sets.
    """
    output = Path(output)
    _refuse_request(output, limits, evaluation, seed)
    train, unseen = _Tally(), _Tally()
    parts: list[str] = []
    with _workshop(output) as work:
        _deal(
            [(train, source), *([(unseen, held_out)] if held_out else [])],
            work, parts, limits=limits, max_tokens=max_tokens, count_tokens=count_tokens, seed=seed,
        )  # fmt: skip
        kept, unseen_kept = _sort(work, train, unseen)
        _refuse_nothing(kept, train, source)
        if held_out:
            _refuse_nothing(unseen_kept, unseen, held_out)
        sizes = _sizes(kept, unseen_kept, evaluation, held_out is not None)
        report = {
            "source": source.kind, "split": source.split, "seed": seed,
            "limits": {**limits._asdict(), "max_tokens": max_tokens},
            **train.report(kept), "metadata": sorted(train.metadata),
        }  # fmt: skip
        if held_out:
            report["unseen"] = {"source": held_out.kind, "split": held_out.split, **unseen.report(unseen_kept)}
        report["sets"] = _write_sets(work / "new", _sets(work, parts, sizes, held_out is not None), shard_size)
        write_json(work / "new" / REPORT, report)
        _publish(work / "new", output)
    return report


def _refuse_request(output: Path, limits: clean.Limits, evaluation: int | None, seed: int) -> None:
    """Raises: UserError about what can be known before anything is read."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}; expected an integer from 0 that fits 63 bits")
    if evaluation is not None and evaluation < 0:
        raise UserError(f"--eval is {evaluation}; expected a number of prompts, 0 for no evaluation sets")
    if not 1 <= limits.min_chars <= limits.max_chars:
        raise UserError(f"lengths of {limits.min_chars} to {limits.max_chars} characters do not fit; expected 1 <= min <= max")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty; choose another directory or remove it first")


@contextlib.contextmanager
def _workshop(output: Path) -> Iterator[Path]:
    """A hidden directory beside `output`, on the same disk, that is gone after the block. Raises: UserError for any OSError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose a directory that can") from error
    try:
        yield work
    except OSError as error:
        raise UserError(f"building {output} failed ({error}); see that the disk has room for the texts twice") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_sets(directory: Path, sets: Iterable[tuple[str, Iterable[Prompt]]], shard_size: int) -> dict[str, int]:
    """The shards of every set that has prompts, and their index. Returns: how many prompts are in each."""
    written = {name: write_shards(prompts, directory, name, shard_size=shard_size) for name, prompts in sets}
    entries = {name: entry for name, entry in written.items() if entry.total}
    hashes = [shard.sha256 for entry in entries.values() for shard in entry.shards]
    write_index(directory, entries, f"{FORMAT}-{hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:16]}")
    return {name: entry.total for name, entry in entries.items()}


def _publish(built: Path, output: Path) -> None:
    """Give the whole directory its name. Raises: UserError if the name is taken by now."""
    with contextlib.suppress(OSError):
        output.rmdir()  # it is empty, or was never there
    try:
        os.rename(built, output)
    except OSError as error:
        raise UserError(f"--output {output} came into being meanwhile ({error.strerror}); choose another one") from error


def _refuse_nothing(kept: int, tally: _Tally, source: Source) -> None:
    if kept:
        return
    if not tally.rows:
        raise UserError(f"prompt source {source.kind!r} has no rows; give another --input or --split")
    reason, count = tally.dropped.most_common(1)[0]
    raise UserError(
        f"none of the {tally.rows} rows of source {source.kind!r} is a prompt; {count} of them: {clean.REASONS[reason]}, "
        f"e.g. {tally.examples[reason][0]}"
    )


# ------------------------------------------------------------------------------------------------------------- to the disk
def _checked(tally: _Tally, rows: Iterable[Row], limits: clean.Limits) -> Iterator[tuple[Row, str]]:
    for row in rows:
        tally.rows += 1
        if row.text is None:
            tally.drop("unreadable", row.fault or "", row)
            continue
        text, reason = clean.check(row.text, limits)
        if reason:
            tally.drop(reason, text, row)
        else:
            yield row, text


def _short_enough(
    tally: _Tally, checked: Iterator[tuple[Row, str]], max_tokens: int, count_tokens: CountTokens
) -> Iterator[tuple[Row, str]]:
    while batch := list(itertools.islice(checked, TOKEN_BATCH)):
        for (row, text), tokens in zip(batch, count_tokens([text for _, text in batch])):
            if tokens > max_tokens:
                tally.drop("too long", f"{tokens} tokens: {text}", row)
            else:
                yield row, text


def _deal(
    sources: list[tuple[_Tally, Source]],
    work: Path,
    parts: list[str],
    *,
    limits: clean.Limits,
    max_tokens: int | None,
    count_tokens: CountTokens | None,
    seed: int,
) -> None:
    """Read everything once and write what passes into the files by hash. Names of parts are added to `parts`."""
    key = b"prompts" + seed.to_bytes(8, "little")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_bucket(work, i).open("wb", buffering=8192)) for i in range(BUCKETS)]
        for held_out, (tally, source) in enumerate(sources):
            checked = _checked(tally, source.rows(), limits)
            if max_tokens is not None and count_tokens is not None:
                checked = _short_enough(tally, checked, max_tokens, count_tokens)
            for row, text in checked:
                part = 0
                if held_out and row.part:
                    if row.part not in parts:
                        parts.append(row.part)
                    part = 1 + parts.index(row.part)
                digest = hashlib.blake2b(clean.comparable(text).encode(), digest_size=16, key=key).digest()
                tally.metadata.update(row.metadata or ())
                metadata = json.dumps(row.metadata, ensure_ascii=False).encode() if row.metadata else b""
                files[digest[0]].write(_Kept(digest, bool(held_out), part, text, metadata).packed())


def _bucket(work: Path, number: int) -> Path:
    return work / f"bucket-{number:03d}"


def _read_bucket(path: Path) -> Iterator[_Kept]:
    data, position = path.read_bytes(), 0
    while position < len(data):
        digest, held_out, part, size, beside = _RECORD.unpack_from(data, position)
        position += _RECORD.size
        text, metadata = data[position : position + size].decode(), data[position + size : position + size + beside]
        yield _Kept(digest, bool(held_out), part, text, metadata)
        position += size + beside


def _sort(work: Path, train: _Tally, unseen: _Tally) -> tuple[int, int]:
    """Free every file from duplicates and sort it. Returns: how many training and how many held-out prompts there are."""
    kept = unseen_kept = 0
    for number in range(BUCKETS):
        first: dict[bytes, _Kept] = {}
        for record in _read_bucket(_bucket(work, number)):
            other = first.get(record.digest)
            if other is None:
                first[record.digest] = record
                continue
            # Held-out prompts come after the training source, and take precedence: whatever equals one is not trained on.
            if record.held_out and not other.held_out:
                first[record.digest] = record
                train.drop("held out", other.text)
            else:
                (unseen if record.held_out else train).drop("duplicate", record.text)
        with _bucket(work, number).open("wb") as file:
            for digest in sorted(first):
                record = first[digest]
                file.write(record.packed())
                unseen_kept += record.held_out
                kept += not record.held_out
    return kept, unseen_kept


# ---------------------------------------------------------------------------------------------------------------- to sets
class _Sizes(NamedTuple):
    unseen: int
    seen: int


def _sizes(kept: int, unseen_kept: int, evaluation: int | None, has_held_out: bool) -> _Sizes:
    if evaluation == 0:
        return _Sizes(0, 0)
    if has_held_out:
        wanted = EVAL_SIZE if evaluation is None else evaluation
        return _Sizes(min(wanted, unseen_kept), min(wanted, kept))
    wanted = min(EVAL_SIZE, max(1, kept // 10)) if evaluation is None else evaluation
    if wanted >= kept:
        raise UserError(
            f"--eval {wanted} holds out {wanted} of {kept} prompts and leaves none to train on; hold out fewer, or give --eval 0"
        )
    return _Sizes(wanted, min(wanted, kept - wanted))


def _sets(work: Path, parts: list[str], sizes: _Sizes, has_held_out: bool) -> Iterator[tuple[str, Iterable[Prompt]]]:
    """The name and the prompts of every set; each goes through the sorted files anew."""

    def prompts(held_out: bool, part: int | None = None) -> Iterator[Prompt]:
        index = -1
        for number in range(BUCKETS):
            for record in _read_bucket(_bucket(work, number)):
                index += 1
                # Without a source of their own the first prompts of all are the held-out ones.
                is_held_out = record.held_out if has_held_out else index < sizes.unseen
                if is_held_out == held_out and part in (None, record.part):
                    metadata: dict[str, Any] = {"split": "unseen" if held_out else "train"}
                    if record.metadata:
                        metadata |= json.loads(record.metadata)
                    if record.part:
                        metadata["part"] = parts[record.part - 1]
                    yield Prompt(index, record.text, metadata)

    yield TEXT_SET, prompts(False)
    if sizes.seen:
        yield "seen_eval", itertools.islice(prompts(False), sizes.seen)
    if sizes.unseen:
        yield "unseen_eval", itertools.islice(prompts(True), sizes.unseen)
        for place, part in enumerate(parts, start=1):
            yield f"unseen_{part}", prompts(True, place)
