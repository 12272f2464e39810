"""Where prompts come from: files and data sets as streams of rows, a row at a time in flat memory.

A row that cannot be read is a row with a fault, never an error: one broken line in a million must not cost the other ones.
A file that is something else altogether, such as a git-lfs pointer, is an error.

What a row holds beside its text and JSON can keep is the prompt's metadata, which rewards receive. HPDv2 and Pick-a-Pic have
none: what is beside their prompts is about pairs of images.

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
import math
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from prdp_fast.core.errors import UserError
from prdp_fast.prompts.files import encoding_of, split_lines

KINDS = ("hpdv2", "pickapic", "txt", "csv", "jsonl", "json", "parquet")  # and hf:DATASET
COLUMNS = ("prompt", "caption", "text")  # tried in this order where none is named
BENCHMARK = "benchmark"  # the split of HPDv2 that holds its four styles
STYLES = ("anime", "concept-art", "paintings", "photo")
LONGEST_LINE = 1 << 20  # bytes; a longer one is no prompt, and is not read into memory
LONGEST_VALUE = 1 << 24  # characters of one element of a JSON list
CHUNK = 1 << 18  # characters
BATCH = 1024  # rows of a parquet file
DELIMITERS = (",", "\t", ";", "|")  # of CSV, tried in this order until the header has the column
LONGEST_RECORD = 1000  # lines of one CSV record; a quote that is open for longer was never closed
METADATA_BYTES = 32 << 10  # as JSON, of one prompt
RESERVED = ("text", "index", "split", "part")  # names of ours in a prompt's record; a column of that name becomes source_NAME


class Row(NamedTuple):
    text: str | None
    file: str  # its name
    number: int  # line or row, from 1
    part: str | None = None  # style of an HPDv2 benchmark file
    fault: str | None = None  # why there is no text
    metadata: dict[str, Any] | None = None  # what is beside the text, as JSON has it


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
                encoding = encoding_of(path)
                for number, value in enumerate(read(path, column, encoding), start=1):
                    yield _row(value, path.name, number, part, metadata=self.kind != "hpdv2")
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
        files = sorted(
            path for path in directory.rglob("*")
            if path.name.lower().endswith(endings) and path.is_file() and not is_hidden(path.relative_to(directory))
        )  # fmt: skip
        named = self.split or ("train" if self.kind == "pickapic" else None)
        if named:
            files = [path for path in files if path.name.startswith((f"{named}-", f"{named}.")) or path.parent.name == named]
        if not files:
            of_split = f" of split {named!r}" if named else ""
            raise UserError(f"prompt input {directory} holds no *{endings[0]} file{of_split}; give another --input or --split")
        return files


class _Fault(NamedTuple):
    reason: str


class _Record(NamedTuple):
    text: str
    beside: dict[str, Any]  # the other columns


_Value = str | _Fault | _Record


def is_hidden(path: Path) -> bool:
    """Drafts of notebooks, macOS's "._" files and the like: nobody means them by naming the directory."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _row(value: _Value, file: str, number: int, part: str | None = None, *, metadata: bool = True) -> Row:
    if isinstance(value, _Fault):
        return Row(None, file, number, part, value.reason)
    if isinstance(value, str):
        return Row(value, file, number, part)
    kept = _json_able(value.beside) if metadata else {}
    size = len(json.dumps(kept)) if kept else 0
    if size > METADATA_BYTES:
        return Row(None, file, number, part, f"{size} bytes of metadata beside the text; expected at most {METADATA_BYTES}")
    return Row(value.text, file, number, part, None, kept or None)


def _json_able(beside: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in beside.items():
        if isinstance(name, str) and name.strip() and _is_json(value):
            kept[f"source_{name}" if name in RESERVED else name] = value
    return kept


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value) and all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, encoding: str) -> Iterator[str | _Fault]:
    """Lines without their ends, which may be of any system. The file may start with a byte order mark."""
    with _open(path) as file:
        if encoding != "utf-8-sig":
            yield from _decoded_lines(io.TextIOWrapper(file, encoding=encoding, errors="replace"))
            return
        for number, line in enumerate(split_lines(file, LONGEST_LINE)):
            if line is None:
                yield _Fault(f"a line of more than {LONGEST_LINE} bytes")
                continue
            try:
                yield line.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError:
                yield _Fault("not UTF-8")


def _decoded_lines(file: io.TextIOWrapper) -> Iterator[str | _Fault]:
    while line := file.readline(LONGEST_LINE):
        if len(line) < LONGEST_LINE or line.endswith("\n"):
            yield line.removesuffix("\n")
            continue
        while (rest := file.readline(LONGEST_LINE)) and not rest.endswith("\n"):
            pass
        yield _Fault(f"a line of more than {LONGEST_LINE} characters")


def _text_rows(path: Path, column: str | None, encoding: str) -> Iterator[_Value]:
    return _lines(path, encoding)


def _field(value: Any, column: str | None) -> _Value:
    """The text of a decoded JSON value: a string, or an object's column with what is beside it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return _Fault(f"neither a text nor an object but {type(value).__name__}")
    name = column or next((name for name in COLUMNS if name in value), None)
    if name is None or name not in value:
        return _Fault(f"no column {name or ' or '.join(COLUMNS)}; it has {', '.join(map(str, list(value)[:8])) or 'none'}")
    text = value.pop(name)
    return _Record(text, value) if isinstance(text, str) else _Fault(f"column {name} is no text but {type(text).__name__}")


def _jsonl_rows(path: Path, column: str | None, encoding: str) -> Iterator[_Value]:
    for line in _lines(path, encoding):
        if isinstance(line, _Fault):
            yield line
        elif line.strip():
            try:
                yield _field(json.loads(line), column)
            except (ValueError, RecursionError):
                yield _Fault("not JSON")


# Where an element may begin after one that cannot be read: an object or a text behind a comma; after an object, which has commas
# and texts of its own, a text only behind a brace.
_NEXT_ELEMENT = re.compile(r',\s*(?=[{"])')
_NEXT_AFTER_OBJECT = re.compile(r',\s*(?=\{)|\}\s*,\s*(?=")')


def _json_rows(path: Path, column: str | None, encoding: str) -> Iterator[_Value]:
    """The elements of one JSON list, decoded one by one: the train.json of HPDv2 has 116 MB."""
    decode = json.JSONDecoder().raw_decode
    with io.TextIOWrapper(_open(path), encoding=encoding, errors="replace") as file:
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
                position, started = position + 1, True
                if not skip(" \t\r\n"):
                    return
                yield _Fault("the list ends before the file does")
                continue
            broken = None
            while True:
                try:
                    value, end = decode(text, position)
                    if end < len(text) or ended:
                        break
                except RecursionError:
                    broken = "JSON nested too deeply"
                except ValueError as error:
                    # An error far from the end of what was read is no matter of reading on.
                    far = (
                        isinstance(error, json.JSONDecodeError) and error.pos < len(text) - 64 and "Unterminated" not in error.msg
                    )
                    if far or ended or len(text) - position > LONGEST_VALUE:
                        broken = "not JSON"
                if broken:
                    break
                more = file.read(max(CHUNK, len(text) - position))  # twice as much each time: linear in the element's length
                text, position, ended = text[position:] + more, 0, not more
            started = True
            if broken is None:
                position = end
                yield _field(value, column)
                continue
            pattern = _NEXT_AFTER_OBJECT if text[position] == "{" else _NEXT_ELEMENT
            following = pattern.search(text, position + 1)
            if following is None:
                yield _Fault(f"{broken}; the rest of the file is lost")
                return
            yield _Fault(broken)
            position = following.end()


def _find(names: Sequence[str], column: str | None) -> str | None:
    """The column of the text. One that is guessed may be written Prompt or " prompt"."""
    if column is not None:
        return column if column in names else None
    exact = next((name for name in COLUMNS if name in names), None)
    return exact or next((name for wanted in COLUMNS for name in names if name.strip().casefold() == wanted), None)


def _choose(names: Sequence[str], column: str | None, where: str, how: str = "") -> str:
    name = _find(names, column)
    if name is None:
        wanted = repr(column) if column else " or ".join(map(repr, COLUMNS))
        has = ", ".join(map(repr, names)) or "none"
        raise UserError(f"{where} has no column {wanted}; it has {has}{how}: give one as --column")
    return name


def _csv_rows(path: Path, column: str | None, encoding: str) -> Iterator[_Value]:
    with io.TextIOWrapper(_open(path), encoding=encoding, errors="replace", newline=None) as file:
        lines = _CsvLines(file)
        header, delimiter = _csv_header(lines, column, path)
        place = header.index(_choose(header, column, f"prompt file {path}", " (read with commas, tabs, semicolons and bars)"))
        for row in _csv_records(lines, delimiter, len(header)):
            if isinstance(row, _Fault):
                yield row
            elif len(row) < len(header) or any(row[len(header) :]):
                yield _Fault(f"{len(row)} fields, the header has {len(header)}")
            else:
                beside = {name: value for at, (name, value) in enumerate(zip(header, row)) if at != place}
                yield _Record(row[place], beside) if beside else row[place]


class _CsvLines:
    """The lines of a file, with their ends, that can be given back."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self._waiting = file, deque[str]()

    def next(self) -> str:
        """ "" at the end."""
        return self._waiting.popleft() if self._waiting else self._file.readline(LONGEST_LINE)

    def give_back(self, lines: Sequence[str]) -> None:
        self._waiting.extendleft(reversed(lines))


def _csv_header(lines: _CsvLines, column: str | None, path: Path) -> tuple[list[str], str]:
    """The names, and the delimiter that they are read with."""
    line = lines.next()
    if said := re.fullmatch(r"sep=(.)\s*", line):  # as Excel writes it
        return _parsed(lines.next(), said[1]), said[1]
    readings = [(_parsed(line, delimiter), delimiter) for delimiter in DELIMITERS]
    found = next((reading for reading in readings if _find(reading[0], column) is not None), None)
    return found or max(readings, key=lambda reading: len(reading[0]))


def _parsed(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _csv_records(lines: _CsvLines, delimiter: str, width: int) -> Iterator[list[str] | _Fault]:
    """Records without blank ones. A quote that opens a field and is never closed costs its own line, and not those after it."""
    while line := lines.next():
        try:
            row, is_open = _first_record(line, delimiter)
        except csv.Error as error:  # a field beyond csv.field_size_limit()
            while len(line) == LONGEST_LINE and not line.endswith("\n"):
                line = lines.next()
            yield _Fault(f"not CSV ({error})")
            continue
        if is_open:
            whole = _over_lines(line, lines, delimiter, width)
            yield _Fault("a quote that is not closed") if whole is None else whole
        elif row:
            yield row


def _first_record(line: str, delimiter: str) -> tuple[list[str], bool]:
    """The record of a line, and whether a quoted field is still open at its end."""
    asked = 0

    def feed() -> Iterator[str]:
        nonlocal asked
        yield line
        asked += 1

    return next(csv.reader(feed(), delimiter=delimiter), []), asked > 0


def _over_lines(line: str, lines: _CsvLines, delimiter: str, width: int) -> list[str] | None:
    """A record that goes on over line ends inside quotes: closed properly, and as wide as the header. None: there is none."""
    taken: list[str] = []
    size = len(line)

    def feed() -> Iterator[str]:
        nonlocal size
        yield line
        while len(taken) < LONGEST_RECORD and size < LONGEST_LINE and (following := lines.next()):
            taken.append(following)
            size += len(following)
            yield following

    try:
        row = next(csv.reader(feed(), delimiter=delimiter, strict=True), [])
        if len(row) == width:
            return row
    except csv.Error:
        pass
    lines.give_back(taken)
    return None


def _parquet_rows(path: Path, column: str | None, encoding: str, *, beside: bool = True) -> Iterator[_Value]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("reading parquet needs pyarrow, which is not installed; pip install 'prdp-fast[data]'") from error
    with parquet.ParquetFile(path, memory_map=False) as file:
        schema = file.schema_arrow
        name = _choose(schema.names, column, f"prompt file {path}")
        # Images beside the texts, nearly all of the bytes, are not read.
        columns = [name, *(field.name for field in schema if beside and field.name != name and _fits_json(field.type))]
        for batch in file.iter_batches(batch_size=BATCH, columns=columns, use_threads=False):
            for row in batch.select(columns).to_pylist():
                yield _field(row, name)


def _fits_json(kind: Any) -> bool:
    """Whether an Arrow type holds what JSON can: no bytes, no times."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _fits_json(kind.value_type)
    if types.is_struct(kind):
        return all(_fits_json(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_dictionary(kind):
        return _fits_json(kind.value_type)
    checks = (types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string, types.is_null)
    return any(check(kind) for check in checks)


def _caption_rows(path: Path, column: str | None, encoding: str) -> Iterator[_Value]:
    return _parquet_rows(path, column, encoding, beside=False)


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
        schema = getattr(getattr(stream, "features", None), "arrow_schema", None)
        beside = [] if schema is None else [field.name for field in schema if field.name != chosen and _fits_json(field.type)]
        stream = stream.select_columns([chosen, *beside])  # type: ignore[attr-defined]
        for number, row in enumerate(stream, start=1):
            yield _row(_field(dict(row), chosen), name, number)
    except UserError:
        raise
    # The library lets through what its parts raise: connection, authentication, parsing. There is no common base.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"{what} cannot be read ({type(error).__name__}: {reason}); check the name and the connection, or download it and "
            "use --source parquet --input PATH"
        ) from error


_READERS: dict[str, Callable[[Path, str | None, str], Iterator[_Value]]] = {
    "hpdv2": _json_rows,
    "pickapic": _caption_rows,
    "txt": _text_rows,
    "csv": _csv_rows,
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "parquet": _parquet_rows,
}
