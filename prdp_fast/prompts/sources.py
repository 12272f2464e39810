"""Where prompts come from: files and data sets as streams of rows, a row at a time in flat memory.

A row that cannot be read is a row with a fault, never an error: one broken line in a million must not cost the other ones.

Schemas (as published):
    HPDv2 (arXiv 2306.09341)       train.json: a list of {"prompt", "file_path", "human_preference", ...}; test.json: a list of
                                   {"prompt", "image_path", "rank", ...}; benchmark/anime.json, concept-art.json, paintings.json
                                   and photo.json: lists of strings
    Pick-a-Pic v1, v2 (2305.01569) parquet with a column "caption" among ids, labels and images, named SPLIT-00000-of-00646....
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from prdp_fast.core.errors import UserError

KINDS = ("hpdv2", "pickapic", "txt", "csv", "jsonl", "json", "parquet")  # and hf:DATASET
COLUMNS = ("prompt", "caption", "text")  # tried in this order where none is named
BENCHMARK = "benchmark"  # the split of HPDv2 that holds its four styles
STYLES = ("anime", "concept-art", "paintings", "photo")
LONGEST_LINE = 1 << 20  # bytes; a longer one is no prompt, and is not read into memory
LONGEST_VALUE = 1 << 24  # characters of one element of a JSON list
CHUNK = 1 << 18  # characters
BATCH = 1024  # rows of a parquet file


class Row(NamedTuple):
    text: str | None
    file: str  # its name
    number: int  # line or row, from 1
    part: str | None = None  # style of an HPDv2 benchmark file
    fault: str | None = None  # why there is no text


class Source(NamedTuple):
    """A stream of rows that can be read once more by reading it again."""

    kind: str  # of KINDS, or hf:DATASET
    paths: tuple[Path, ...] = ()  # files and directories; none for hf
    split: str | None = None
    column: str | None = None
    subset: str | None = None  # hf: the configuration

    def rows(self) -> Iterator[Row]:
        """Raises: UserError for what no row can be read from: no file, no such column, a library that is missing."""
        if self.kind.startswith("hf:"):
            return _hub_rows(self.kind[3:], self.subset, self.split or "train", self.column)
        if self.kind not in KINDS:
            raise UserError(f"prompt source {self.kind!r} is unknown; expected one of {', '.join(KINDS)} or hf:DATASET")
        return self._file_rows()

    def _file_rows(self) -> Iterator[Row]:
        read = _READERS[self.kind]
        column = self.column or {"hpdv2": "prompt", "pickapic": "caption"}.get(self.kind)
        for path in self.files():
            part = path.stem if self.kind == "hpdv2" and path.stem in STYLES else None
            try:
                for number, value in enumerate(read(path, column), start=1):
                    if isinstance(value, _Fault):
                        yield Row(None, path.name, number, part, value.reason)
                    else:
                        yield Row(value, path.name, number, part)
            except UserError:
                raise
            except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:  # a damaged file costs itself alone
                yield Row(None, path.name, 0, part, f"cannot be read on ({type(error).__name__}: {error})")

    def files(self) -> list[Path]:
        """The files in reading order. Raises: UserError if there are none, or one that was named is not there."""
        if not self.paths:
            raise UserError(f"prompt source {self.kind!r} reads files; give --input PATH")
        found: list[Path] = []
        for path in self.paths:
            if path.is_dir():
                found += self._in_directory(path)
            elif path.is_file():
                found.append(path)
            else:
                raise UserError(f"prompt input {path} does not exist; expected a file or a directory")
        return found

    def _in_directory(self, directory: Path) -> list[Path]:
        if self.kind == "hpdv2":
            split = self.split or "train"
            wanted = [directory / BENCHMARK / f"{style}.json" for style in STYLES] if split == BENCHMARK else []
            wanted = wanted or [directory / f"{split}.json"]
            missing = [path for path in wanted if not path.is_file()]
            if missing:
                raise UserError(
                    f"split {split!r} of HPDv2: {missing[0]} is missing; expected train.json, test.json and "
                    f"{BENCHMARK}/{{{','.join(STYLES)}}}.json in {directory}"
                )
            return wanted
        suffix = "parquet" if self.kind == "pickapic" else self.kind
        endings = (f".{suffix}",) if suffix == "parquet" else (f".{suffix}", f".{suffix}.gz")
        files = sorted(path for path in directory.rglob("*") if path.name.endswith(endings) and path.is_file())
        named = self.split or ("train" if self.kind == "pickapic" else None)
        if named:
            files = [path for path in files if path.name.startswith((f"{named}-", f"{named}.")) or path.parent.name == named]
        if not files:
            of_split = f" of split {named!r}" if named else ""
            raise UserError(f"prompt input {directory} holds no *{endings[0]} file{of_split}; give another --input or --split")
        return files


class _Fault(NamedTuple):
    reason: str


_Value = str | _Fault


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[_Value]:
    """Lines without their ends. The first may start with a byte order mark."""
    with _open(path) as file:
        first = True
        while line := file.readline(LONGEST_LINE):
            if not line.endswith(b"\n") and len(line) == LONGEST_LINE:
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield _Fault(f"a line of more than {LONGEST_LINE} bytes")
            else:
                try:
                    yield line.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    yield _Fault("not UTF-8")
            first = False


def _text_rows(path: Path, column: str | None) -> Iterator[_Value]:
    return _lines(path)


def _field(value: Any, column: str | None) -> _Value:
    """The text of a decoded JSON value: a string, or an object's column."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return _Fault(f"neither a text nor an object but {type(value).__name__}")
    name = column or next((name for name in COLUMNS if name in value), None)
    if name is None or name not in value:
        return _Fault(f"no column {name or ' or '.join(COLUMNS)}; it has {', '.join(map(str, list(value)[:8])) or 'none'}")
    if not isinstance(value[name], str):
        return _Fault(f"column {name} is no text but {type(value[name]).__name__}")
    return value[name]


def _jsonl_rows(path: Path, column: str | None) -> Iterator[_Value]:
    for line in _lines(path):
        if isinstance(line, _Fault):
            yield line
        elif line.strip():
            try:
                yield _field(json.loads(line), column)
            except (ValueError, RecursionError):
                yield _Fault("not JSON")


def _json_rows(path: Path, column: str | None) -> Iterator[_Value]:
    """The elements of one JSON list, decoded one by one: the train.json of HPDv2 has 116 MB."""
    decode = json.JSONDecoder().raw_decode
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="replace") as file:
        text, position, ended, started = "", 0, False, False

        def skip(characters: str) -> bool:
            """Go to the next character that is none of these. False at the end of the file."""
            nonlocal text, position, ended
            while True:
                while position < len(text) and text[position] in characters:
                    position += 1
                if position < len(text):
                    return True
                text, position = file.read(CHUNK), 0
                if not text:
                    ended = True
                    return False

        if not skip(" \t\r\n") or text[position] != "[":
            yield _Fault("not a JSON list")
            return
        position += 1
        while True:
            if not skip(" \t\r\n," if started else " \t\r\n"):
                yield _Fault("the list breaks off")
                return
            if text[position] == "]":
                return
            while True:
                try:
                    value, end = decode(text, position)
                    if end < len(text) or ended:
                        break
                except RecursionError:
                    yield _Fault("JSON nested too deeply; the rest of the file is lost")
                    return
                except ValueError:
                    if ended or len(text) - position > LONGEST_VALUE:
                        yield _Fault("not JSON; the rest of the file is lost")
                        return
                more = file.read(max(CHUNK, len(text) - position))  # twice as much each time: linear in the element's length
                text, position, ended = text[position:] + more, 0, not more
            position, started = end, True
            yield _field(value, column)


def _choose(names: Sequence[str], column: str | None, where: str) -> str:
    name = column or next((name for name in COLUMNS if name in names), None)
    if name is None or name not in names:
        wanted = repr(column) if column else " or ".join(map(repr, COLUMNS))
        raise UserError(f"{where} has no column {wanted}; it has {', '.join(map(repr, names)) or 'none'}: give one as --column")
    return name


def _csv_rows(path: Path, column: str | None) -> Iterator[_Value]:
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        place = header.index(_choose(header, column, f"prompt file {path}"))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # a field beyond csv.field_size_limit(), a NUL
                yield _Fault(f"not CSV ({error})")
                continue
            if row:
                yield row[place] if place < len(row) else _Fault(f"{len(row)} fields, the header has {len(header)}")


def _parquet_rows(path: Path, column: str | None) -> Iterator[_Value]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("reading parquet needs pyarrow, which is not installed; pip install 'prdp-fast[data]'") from error
    with parquet.ParquetFile(path, memory_map=False) as file:
        name = _choose(file.schema_arrow.names, column, f"prompt file {path}")
        # One column alone: the images beside it, nearly all of the bytes, are not read.
        for batch in file.iter_batches(batch_size=BATCH, columns=[name], use_threads=False):
            for value in batch.column(0).to_pylist():
                yield value if isinstance(value, str) else _Fault(f"column {name} is no text but {type(value).__name__}")


def _hub_rows(name: str, subset: str | None, split: str, column: str | None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise UserError("hf: sources need datasets, which is not installed; pip install 'prdp-fast[data]'") from error
    what = f"data set {name!r}{f' ({subset})' if subset else ''}, split {split!r}"
    try:
        stream: Iterable[Any] = datasets.load_dataset(name, subset, split=split, streaming=True)
        names = getattr(stream, "column_names", None)
        if names is None:  # formats without a schema: look at a row
            names = list(next(iter(stream), {}))
        chosen = _choose(names, column, what)
        stream = stream.select_columns([chosen])  # type: ignore[attr-defined]
        for number, row in enumerate(stream, start=1):
            value = _field(row, chosen)
            yield Row(None, name, number, None, value.reason) if isinstance(value, _Fault) else Row(value, name, number)
    except UserError:
        raise
    # The library lets through what its parts raise: connection, authentication, parsing. There is no common base.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"{what} cannot be read ({type(error).__name__}: {reason}); check the name and the connection, or download it and "
            "use --source parquet --input PATH"
        ) from error


_READERS: dict[str, Callable[[Path, str | None], Iterator[_Value]]] = {
    "hpdv2": _json_rows,
    "pickapic": _parquet_rows,
    "txt": _text_rows,
    "csv": _csv_rows,
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "parquet": _parquet_rows,
}
