from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from prdp_fast.core.errors import UserError
from prdp_fast.prompts import sources
from prdp_fast.prompts.sources import Row, Source


def texts(source: Source) -> list[str | None]:
    return [row.text for row in source.rows()]


def faults(source: Source) -> list[str]:
    return [row.fault for row in source.rows() if row.fault]


# ------------------------------------------------------------------------------------------------------- published schemas
def hpdv2(directory: Path, pairs: int = 6) -> Path:
    """The layout and the fields of HPDv2: several pairs of images to a prompt, so prompts come again."""
    train = [
        {
            "human_preference": [1, 0],
            "prompt": f"a prompt with number {pair // 2}",
            "file_path": [f"{pair}a.jpg", f"{pair}b.jpg"],
            "user_hash": ["x", "y"],
        }
        for pair in range(pairs)
    ]
    test = [{"prompt": "a test prompt", "image_path": ["1.jpg", "2.jpg"], "rank": [2, 1], "raw_annotations": [{"rank": [1, 2]}]}]
    (directory / "benchmark").mkdir(parents=True)
    (directory / "train.json").write_text(json.dumps(train))
    (directory / "test.json").write_text(json.dumps(test, indent=2))
    for style in sources.STYLES:
        prompts = [f"{style} prompt {number}" for number in range(3)]
        (directory / "benchmark" / f"{style}.json").write_text(json.dumps(prompts))
    (directory / "benchmark" / "drawbench.json").write_text(json.dumps(["a drawbench prompt"]))
    return directory


def pickapic(directory: Path) -> Path:
    """The columns and the file names of Pick-a-Pic v1, with bytes of images beside the captions."""
    directory.mkdir(parents=True)
    captions = {
        "train-00000-of-00002-abc": ["a caption", "a caption", None],
        "train-00001-of-00002-def": ["another caption"],
        "validation-00000-of-00001-ghi": ["of validation"],
        "test_unique-00000-of-00001-jkl": ["a test caption"],
        "test-00000-of-00001-mno": ["not unique"],
    }
    for name, column in captions.items():
        n = len(column)
        table = pa.table(
            {
                "are_different": [True] * n,
                "best_image_uid": ["u"] * n,
                "caption": pa.array(column, pa.string()),
                "jpg_0": [b"\xff\xd8" * 1000] * n,
                "label_0": [1.0] * n,
                "ranking_id": list(range(n)),
            }
        )
        parquet.write_table(table, directory / f"{name}.parquet", row_group_size=2)
    return directory


def test_hpdv2(tmp_path: Path) -> None:
    directory = hpdv2(tmp_path / "HPDv2")
    assert texts(Source("hpdv2", (directory,))) == [f"a prompt with number {n}" for n in (0, 0, 1, 1, 2, 2)]
    assert texts(Source("hpdv2", (directory,), "test")) == ["a test prompt"]
    rows = list(Source("hpdv2", (directory,), "benchmark").rows())
    assert [row.text for row in rows] == [f"{style} prompt {n}" for style in sources.STYLES for n in range(3)]
    assert [row.part for row in rows[::3]] == ["anime", "concept-art", "paintings", "photo"]
    assert rows[4] == Row("concept-art prompt 1", "concept-art.json", 2, "concept-art")
    assert texts(Source("hpdv2", (directory / "test.json", directory / "benchmark" / "photo.json")))[:2] == [
        "a test prompt",
        "photo prompt 0",
    ]
    (directory / "benchmark" / "paintings.json").unlink()
    with pytest.raises(UserError, match=r"paintings.json is missing"):
        texts(Source("hpdv2", (directory,), "benchmark"))


def test_pickapic(tmp_path: Path) -> None:
    directory = pickapic(tmp_path / "data")
    rows = list(Source("pickapic", (directory,)).rows())
    assert [row.text for row in rows] == ["a caption", "a caption", None, "another caption"]
    assert rows[2].fault == "column caption is no text but NoneType" and rows[2].number == 3
    assert texts(Source("pickapic", (directory,), "test_unique")) == ["a test caption"]
    assert texts(Source("pickapic", (directory,), "test")) == ["not unique"]
    with pytest.raises(UserError, match=r"holds no \*.parquet file of split 'absent'"):
        texts(Source("pickapic", (directory,), "absent"))


def test_only_the_caption_column_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = parquet.ParquetFile.iter_batches

    def spy(self, **options):  # type: ignore[no-untyped-def]
        asked.append(options["columns"])
        return plain(self, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", spy)
    texts(Source("pickapic", (pickapic(tmp_path / "data"),)))
    assert asked == [["caption"]] * 2


def test_parquet_by_column_and_by_guess(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    parquet.write_table(pa.table({"id": [1, 2], "text": ["b", "c"], "title": ["d", "e"]}), path)
    assert texts(Source("parquet", (path,))) == ["b", "c"]
    assert texts(Source("parquet", (path,), column="title")) == ["d", "e"]
    with pytest.raises(UserError, match=r"no column 'caption'; it has 'id', 'text', 'title'"):
        texts(Source("parquet", (path,), column="caption"))


def test_a_damaged_parquet_file_costs_itself_alone(tmp_path: Path) -> None:
    directory = pickapic(tmp_path / "data")
    (directory / "train-00000-of-00002-abc.parquet").write_bytes(b"PAR1 not really")
    rows = list(Source("pickapic", (directory,)).rows())
    assert [row.text for row in rows] == [None, "another caption"]
    assert "cannot be read on (ArrowInvalid" in (rows[0].fault or "")


# ----------------------------------------------------------------------------------------------------------------- lines
def test_text_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\na Bär\n".encode() + b"a \xff\nthe end")
    rows = list(Source("txt", (path,)).rows())
    assert [row.text for row in rows] == ["a cat", "", "a Bär", None, "the end"]
    assert (rows[3].fault, rows[3].file, rows[3].number) == ("not UTF-8", "prompts.txt", 4)


def test_compressed_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt.gz"
    path.write_bytes(gzip.compress(b"a cat\na dog\n"))
    assert texts(Source("txt", (path,))) == ["a cat", "a dog"]
    path.write_bytes(gzip.compress(b"".join(b"prompt number %d\n" % n for n in range(100_000)))[:-2000])
    rows = list(Source("txt", (path,)).rows())
    assert rows[0].text == "prompt number 0" and len(rows) > 1000
    assert rows[-1].text is None and "cannot be read on (EOFError" in (rows[-1].fault or "")


def test_a_line_without_end_stays_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 20)
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a cat\n" + b"x" * 70 + b"\na dog\n" + b"y" * 19 + b"\n" + b"z" * 50)
    assert texts(Source("txt", (path,))) == ["a cat", None, "a dog", "y" * 19, None]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "a"}',
        "",
        '"b"',
        "{",
        "7",
        '{"other": "c", "id": 1}',
        '{"prompt": 3}',
        '{"caption": "d"}',
        "[" * 100_000,
    ]
    path.write_text("\n".join(lines))
    rows = list(Source("jsonl", (path,)).rows())
    assert [row.text for row in rows] == ["a", "b", None, None, None, None, "d", None]
    assert [row.fault for row in rows if row.fault] == [
        "not JSON",
        "neither a text nor an object but int",
        "no column prompt or caption or text; it has other, id",
        "column prompt is no text but int",
        "not JSON",
    ]
    assert texts(Source("jsonl", (path,), column="other"))[4] == "c"


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('\ufeffid,caption,n\n1,"a cat, sitting",2\n2\n3,"two\nlines",4\n\n5,"a ""dog""",6\n', encoding="utf-8")
    rows = list(Source("csv", (path,)).rows())
    assert [row.text for row in rows] == ["a cat, sitting", None, "two\nlines", 'a "dog"']
    assert rows[1].fault == "1 fields, the header has 3"
    with pytest.raises(UserError, match=r"no column 'text'; it has 'id', 'caption', 'n'"):
        texts(Source("csv", (path,), column="text"))


def test_csv_with_a_field_too_long_goes_on_after_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"caption\na cat\n{'x' * 200_000}\na dog\n")
    assert texts(Source("csv", (path,))) == ["a cat", None, "a dog"]


# ------------------------------------------------------------------------------------------------------------- JSON lists
@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 18])
def test_json_lists_are_the_same_in_pieces_of_any_size(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", chunk)
    path = tmp_path / "list.json"
    values = [
        {"prompt": 'with "quotes", [brackets] and \\'},
        "b",
        {"prompt": "ü" * 40, "deep": [[{"a": 1}], 2.5e3]},
        123456,
        None,
    ]
    for indent in (None, 2):
        path.write_text(json.dumps(values, indent=indent) + "\n")
        assert texts(Source("json", (path,))) == [values[0]["prompt"], "b", "ü" * 40, None, None]  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "expected", "fault"),
    [
        ('["a", "b"', ["a", "b"], "the list breaks off"),
        ('["a", {"prompt": "b"', ["a"], "not JSON; the rest of the file is lost"),
        ('["a", nonsense, "c"]', ["a", "c"], "not JSON"),
        ('["a", {"prompt": "b, "id": 1}, {"prompt": "c"}, "d"]', ["a", "c", "d"], "not JSON"),
        ('{"prompts": ["a"]}', [], "not a JSON list"),
        ("", [], "not a JSON list"),
        ('["a", ' + "[" * 100_000, ["a"], "the rest of the file is lost"),
        ("[]", [], None),
        ('["a", ], "b", "c"]\n', ["a", "b", "c"], "the list ends before the file does"),
    ],
)
def test_json_that_breaks_off(tmp_path: Path, content: str, expected: list[str], fault: str | None) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    assert [text for text in texts(Source("json", (path,))) if text is not None] == expected
    found = faults(Source("json", (path,)))
    assert len(found) == (fault is not None) and all(fault in one for one in found if fault)


def test_an_element_without_end_stays_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_VALUE", 1000)
    monkeypatch.setattr(sources, "CHUNK", 100)
    path = tmp_path / "list.json"
    path.write_text(json.dumps(["a", "x" * 10_000_000]))
    read = 0
    plain = sources.io.TextIOWrapper.read

    class Counting(sources.io.TextIOWrapper):
        def read(self, size=-1):  # type: ignore[no-untyped-def]
            nonlocal read
            read += size
            return plain(self, size)

    monkeypatch.setattr(sources.io, "TextIOWrapper", Counting)
    assert texts(Source("json", (path,))) == ["a", None]
    assert read < 10_000


# ------------------------------------------------------------------------------------------------------------------- hub
def test_hub_data_sets_are_streamed(tmp_path: Path) -> None:
    """A directory stands in for a data set of the hub: the same library call reads both."""
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "train.jsonl").write_text("".join(json.dumps({"id": n, "caption": f"caption {n}"}) + "\n" for n in range(5)))
    (directory / "test.jsonl").write_text(json.dumps({"id": 9, "caption": "of the test"}) + "\n")
    assert texts(Source(f"hf:{directory}")) == [f"caption {n}" for n in range(5)]
    assert texts(Source(f"hf:{directory}", split="test")) == ["of the test"]
    assert faults(Source(f"hf:{directory}", column="id")) == ["column id is no text but int"] * 5
    with pytest.raises(UserError, match=r"split 'train' has no column 'prompt'; it has 'id', 'caption'"):
        texts(Source(f"hf:{directory}", column="prompt"))


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data set 'nobody/nothing', split 'train' cannot be read .*download it") as caught:
        texts(Source("hf:nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, message in [
        (Source("xml", (tmp_path,)), "'xml' is unknown; expected one of hpdv2, pickapic"),
        (Source("txt"), "give --input PATH"),
        (Source("txt", (tmp_path / "absent",)), "absent does not exist"),
        (Source("txt", (tmp_path,)), r"holds no \*.txt file;"),
    ]:
        with pytest.raises(UserError, match=message):
            texts(source)
    path = tmp_path / "one.parquet"
    parquet.write_table(pa.table({"text": ["b"]}), path)
    for module, source in (("pyarrow", Source("parquet", (path,))), ("datasets", Source("hf:x"))):
        with monkeypatch.context() as patched:
            patched.setitem(__import__("sys").modules, module, None)
            with pytest.raises(UserError, match=rf"{module}, which is not installed; pip install 'prdp-fast\[data\]'"):
                texts(source)
