"""Prompt files in the wild: what is no such file is refused, any system's text is read, and nothing is lost uncounted."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import PromptSet, build_text_shards, shards, sources, write_index, write_shards
from prdp_fast.prompts.curate import curate
from prdp_fast.prompts.files import split_lines
from prdp_fast.prompts.sources import Row, Source
from prdp_fast.prompts.verify import verify

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 116043\n" % 7
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html><html><body>404</body></html>"
MAC = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \xb0"
KINDS = {"txt": "txt", "csv": "csv", "jsonl": "jsonl", "json": "json", "parquet": "parquet", "pickapic": "parquet"}


def rows(source: Source) -> list[Row]:
    return list(source.rows())


def texts(source: Source) -> list[str | None]:
    return [row.text for row in source.rows()]


def file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ------------------------------------------------------------------------------------------------------- what is no such file
@pytest.mark.parametrize(
    ("content", "message"), [(POINTER, "pointer of git-lfs.*git lfs pull"), (PAGE, "web page"), (MAC, "macOS")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_something_else(tmp_path, content, message, packed):
    for kind, ending in KINDS.items():
        path = file(tmp_path / f"a.{ending}{'.gz' if packed else ''}", gzip.compress(content) if packed else content)
        with pytest.raises(UserError, match=message):
            rows(Source(kind, (path,)))
    if not packed:
        with pytest.raises(UserError, match=message):
            PromptSet.open(file(tmp_path / "b.txt", content), "train")


def test_pointers_in_the_place_of_shards(small_directory):
    (small_directory / "train-00001.tar.gz").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"train-00001\.tar\.gz is a pointer of git-lfs"):
        PromptSet.open(small_directory, "train")
    (small_directory / "index.json").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"index\.json is a pointer of git-lfs"):
        PromptSet.open(small_directory, "train")


def test_hidden_files_of_a_directory_are_not_read(tmp_path):
    file(tmp_path / "d/a.csv", "prompt\na cat\n")
    file(tmp_path / "d/sub/B.CSV", "prompt\na dog\n")
    for name in ("._a.csv", ".ipynb_checkpoints/a-checkpoint.csv", ".git/x.csv", "__MACOSX/._a.csv", "sub/.hidden.csv"):
        file(tmp_path / "d" / name, MAC if "._" in name else "prompt\nan old draft\n")
    assert texts(Source("csv", (tmp_path / "d",))) == ["a cat", "a dog"]
    with pytest.raises(UserError, match=r"holds no \*\.csv file"):
        rows(Source("csv", (tmp_path / "d/.git/..", tmp_path / "d/__MACOSX/.."), split="absent"))


# --------------------------------------------------------------------------------------------------------------- bytes and lines
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_encodings(tmp_path, end, encoding, last):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    lines = ["a red lighthouse", "ein Bär", "大きな猫"]
    plain = mark + end.join(lines) + (end if last else "")
    path = file(tmp_path / "a.txt", plain.encode(encoding))
    assert texts(Source("txt", (path,))) == lines
    build_text_shards(path, tmp_path / "built")
    assert {p.text: p.index for p in PromptSet.open(tmp_path / "built", "train")} == {line: n for n, line in enumerate(lines)}
    table = mark + end.join(["id,prompt", *(f'{n},"{line}"' for n, line in enumerate(lines))]) + (end if last else "")
    found = rows(Source("csv", (file(tmp_path / "a.csv", table.encode(encoding)),)))
    assert [(row.text, row.metadata) for row in found] == [(line, {"id": str(n)}) for n, line in enumerate(lines)]
    objects = mark + end.join(json.dumps({"prompt": line}, ensure_ascii=False) for line in lines) + (end if last else "")
    assert texts(Source("jsonl", (file(tmp_path / "a.jsonl", objects.encode(encoding)),))) == lines
    elements = mark + json.dumps(lines, indent=1).replace("\n", end)
    assert texts(Source("json", (file(tmp_path / "a.json", elements.encode(encoding)),))) == lines


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_lines_are_the_same_in_pieces_of_any_size(piece, monkeypatch):
    monkeypatch.setattr("prdp_fast.prompts.files.PIECE", piece)
    content = b"a\r\n\r\rb\n\nc\r\n" + b"x" * 30 + b"\rd\n" + b"y" * 19 + b"\n\r\nlast"
    assert list(split_lines(io.BytesIO(content), 20)) == [b"a", b"", b"", b"b", b"", b"c", None, b"d", b"y" * 19, b"", b"last"]


def test_zero_bytes(tmp_path):
    path = file(tmp_path / "a.txt", b"a cat\r\na\0dog\nan owl\n")
    with pytest.raises(UserError, match=r"a\.txt has a zero byte in line 2"):
        build_text_shards(path, tmp_path / "built")
    assert curate(Source("txt", (path,)), tmp_path / "out", evaluation=0)["dropped"] == {"control": 1}
    path = file(tmp_path / "b.txt", "a cat\nein Bär\n".encode("utf-16-le"))  # no mark says that it is UTF-16
    with pytest.raises(UserError, match=r"zero byte in line 1|not UTF-8 in line 2"):
        build_text_shards(path, tmp_path / "built2")


# ------------------------------------------------------------------------------------------------------------------------ tables
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_delimiters(tmp_path, delimiter):
    d = delimiter
    path = file(tmp_path / "a.csv", f'id{d}Prompt{d}Category\n1{d}a red lighthouse{d}Arts\n2{d}"two {d} cats"{d}Animals\n')
    for column in (None, "Prompt"):
        found = rows(Source("csv", (path,), column=column))
        assert [(row.text, row.fault) for row in found] == [("a red lighthouse", None), (f"two {d} cats", None)]
        assert found[1].metadata == {"id": "2", "Category": "Animals"}
    with pytest.raises(UserError, match=r"no column 'absent'; it has .* \(read with commas, tabs, semicolons and bars\)"):
        rows(Source("csv", (path,), column="absent"))


def test_a_line_of_excels(tmp_path):
    assert texts(Source("csv", (file(tmp_path / "a.csv", "sep=;\nid;prompt\n1;a cat, sitting\n"),))) == ["a cat, sitting"]


def test_a_malformed_row_costs_itself_alone(tmp_path):
    content = (
        'id,prompt,n\n1,a cat,0\n2,"never closed,0\n3,"a, b",0\n4,a "big" dog,0\n5,too,many,fields\n6,few\n7,"two\nlines",0\n'
        '8,"another "odd one,0\n9,the end,0,,\n10,"open at the end,0\n'
    )
    found = rows(Source("csv", (file(tmp_path / "a.csv", content),)))
    assert [row.text for row in found] == [
        "a cat",
        None,
        "a, b",
        'a "big" dog',
        None,
        None,
        "two\nlines",
        "another odd one",
        "the end",
        None,
    ]
    assert [row.fault for row in found if row.fault] == [
        "a quote that is not closed", "4 fields, the header has 3", "2 fields, the header has 3", "a quote that is not closed",
    ]  # fmt: skip


def test_a_quote_that_is_open_for_the_rest_of_a_large_file(tmp_path):
    content = "prompt,id\n" + '"open,0\n' + "".join(f"prompt number {n},{n}\n" for n in range(5000))
    found = texts(Source("csv", (file(tmp_path / "a.csv", content),)))
    assert found == [None, *(f"prompt number {n}" for n in range(5000))]


# ---------------------------------------------------------------------------------------------------------------------- metadata
def test_what_is_beside_the_prompt_reaches_the_reward(tmp_path):
    record = {
        "tag": "two",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a bench",
        "text": "OCR",
        "index": 4,
        "ü": None,
    }
    lines = [record, {"prompt": "a cat", "score": float("nan"), "": 1}, {"prompt": "A  cat", "other": 2}, "plain"]
    path = file(tmp_path / "g.jsonl", "\n".join(map(json.dumps, lines)))
    report = curate(Source("jsonl", (path,)), tmp_path / "out", evaluation=0)
    found = {prompt.text: prompt.metadata for prompt in PromptSet.open(tmp_path / "out", "train")}
    assert found == {
        "a bench": {
            "tag": "two", "include": [{"class": "bench", "count": 1}], "source_text": "OCR", "source_index": 4, "ü": None,
            "split": "train",
        },
        "a cat": {"split": "train"},
        "plain": {"split": "train"},
    }  # fmt: skip
    assert report["dropped"] == {"duplicate": 1} and report["metadata"] == [
        "include",
        "other",
        "source_index",
        "source_text",
        "tag",
        "ü",
    ]
    assert verify(tmp_path / "out") == []


def test_metadata_of_parquet_without_images(tmp_path):
    table = pa.table({
        "prompt": ["a", "b"], "image": [b"\xff" * 10] * 2, "n": [1, 2], "tags": [["x"], []],
        "at": pa.array([0, 0], pa.timestamp("s")),
        "boxes": [[{"class": "cat", "count": 2}]] * 2, "nested": [{"bytes": b"x", "path": "p"}] * 2,
    })  # fmt: skip
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    found = rows(Source("parquet", (path,)))
    assert found[0].metadata == {"n": 1, "tags": ["x"], "boxes": [{"class": "cat", "count": 2}]} and found[1].text == "b"


def test_metadata_of_a_data_set_of_the_hub(tmp_path):
    file(tmp_path / "set/train.jsonl", "".join(json.dumps({"id": n, "caption": f"caption {n}"}) + "\n" for n in range(3)))
    assert [row.metadata for row in rows(Source(f"hf:{tmp_path / 'set'}"))] == [{"id": n} for n in range(3)]


def test_too_much_metadata_is_counted(tmp_path, monkeypatch):
    path = file(tmp_path / "a.jsonl", json.dumps({"prompt": "a", "page": "x" * 70_000}) + '\n{"prompt": "b c"}\n')
    report = curate(Source("jsonl", (path,)), tmp_path / "out", evaluation=0)
    assert report["dropped"] == {"unreadable": 1} and "70012 bytes of metadata" in report["examples"]["unreadable"][0]
    monkeypatch.setattr(sources, "METADATA_BYTES", 10**6)
    with pytest.raises(UserError, match=r"has \d+ bytes with its metadata; expected at most 65536"):
        curate(Source("jsonl", (path,)), tmp_path / "out2", evaluation=0)


# ------------------------------------------------------------------------------------------------------------------------- bombs
def bomb(directory: Path, data: bytes, count: int = 1) -> None:
    entry = write_shards([Prompt(0, "a cat", {})], directory, "train")
    shard = entry.shards[0]
    (directory / shard.file).write_bytes(data)
    digest = shards.hashlib.sha256(data).hexdigest()
    changed = shard.model_copy(update={"bytes": len(data), "sha256": digest, "count": count})
    write_index(directory, {"train": entry.model_copy(update={"shards": [changed], "total": count})}, "test")


def tar(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE, form: int = tarfile.USTAR_FORMAT, **pax: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.type, entry.pax_headers = len(data), kind, dict(pax)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


GOOD = {"00000000.json": b'{"text": "a cat", "index": 0}'}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(bytes(50_000_000)), "unpacks to more than"),
        (gzip.compress(gzip.compress(tar(GOOD))), "packed once more"),
        (bz2.compress(tar(GOOD)), "not with gzip"),
        (gzip.compress(tar(GOOD, kind=tarfile.GNUTYPE_SPARSE)), "sparse"),
        (tar(GOOD, form=tarfile.PAX_FORMAT, **{"GNU.sparse.realsize": "99999999999"}), "sparse"),
        (b"no tar at all" * 100, "no tar"),
    ],
    ids=["gzip", "twice", "bzip2", "sparse", "pax", "none"],
)
def test_shards_that_unpack_to_more_than_they_can_hold(tmp_path, data, message):
    bomb(tmp_path, data)
    with pytest.raises(UserError, match=rf"train-00000\.tar\.gz cannot be read .*{message}"):
        list(PromptSet.open(tmp_path, "train"))
    assert any(message in fault for fault in verify(tmp_path))


def test_other_writers_shards_are_read(tmp_path):
    bomb(tmp_path, gzip.compress(tar(GOOD, form=tarfile.PAX_FORMAT, comment="ü" * 300)))
    assert list(PromptSet.open(tmp_path, "train")) == [Prompt(0, "a cat", {})]
    half = len(tar(GOOD)) // 2
    bomb(tmp_path, gzip.compress(tar(GOOD)[:half]) + gzip.compress(tar(GOOD)[half:]))  # two members of gzip
    assert [prompt.text for prompt in PromptSet.open(tmp_path, "train")] == ["a cat"]


def test_an_index_cannot_allow_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_UNPACKED", 10**6)
    bomb(tmp_path, gzip.compress(bytes(2_000_000)), count=10**9)
    with pytest.raises(UserError, match="unpacks to more than 1000000 bytes"):
        list(PromptSet.open(tmp_path, "train"))
