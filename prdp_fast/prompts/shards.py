"""Write prompt sets as WebDataset shards.

A directory of prompts holds gzipped tars and one `index.json`:

    train-00000.tar.gz      00012345.json: {"text": "a small red ...", "index": 12345, "split": "train"}, 10,000 of them
    index.json              per set: the files with their prompt counts, bytes and SHA-256

A tar member costs at least 1 KiB, so a prompt is one member, and gzip takes the padding away again. No byte depends on when,
where or by whom a shard was built. The prompts of a set lie in a fixed shuffled order, so that any prefix is a fair sample
and no shard holds a topic of its own.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from prdp_fast.core.cache import default_cache_dir
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import animals
from prdp_fast.prompts.directory import Directory, LocalDirectory
from prdp_fast.prompts.files import encoding_of_bytes, refuse_other
from prdp_fast.world import scenes

FORMAT = 1  # of the shards and the index; part of every version, so that a cache never outlives a change
INDEX = "index.json"
SHARD_SIZE = 10_000  # prompts a shard: a tenth of a megabyte on disk, a third of a second to decode
EVAL_SIZE = 2048  # prompts in each of seen_eval and unseen_eval
TEXT_FORMAT = 2  # of how a text file is read
MEMBER_BYTES = 64 << 10  # of one prompt and its metadata as JSON
TEXT_SET = "train"  # the name of the one set of a text file
BARE_NAME, SHA256 = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", r"^[0-9a-f]{64}$"  # of files in an index
GZIP_LEVEL = 4  # tar padding shrinks to nothing at any level; higher ones cost time and save little


class ShardEntry(BaseModel):
    """One shard. `file` is a bare name: an index can point at nothing outside its own directory."""

    model_config = ConfigDict(extra="forbid")

    file: str = Field(pattern=BARE_NAME)
    count: PositiveInt  # prompts
    bytes: PositiveInt
    sha256: str = Field(pattern=SHA256)


class SetEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    total: NonNegativeInt  # prompts
    shards: list[ShardEntry]

    @model_validator(mode="after")
    def _total_is_the_sum(self) -> SetEntry:
        counted = sum(shard.count for shard in self.shards)
        if counted != self.total:
            raise ValueError(f"total is {self.total}, but the shards hold {counted} prompts")
        return self


class Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: str  # format, then a digest of what the prompts were made from: the grammar, or the text file
    sets: dict[str, SetEntry]


# --------------------------------------------------------------------------------------------------------------- writing
_BLANK_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # mode 0644; time, uid and gid 0; no user, no group


def _header(name: bytes, size: int) -> bytes:
    """What `tarfile` writes for a regular file, at a quarter of its time, which would be half of a build's."""
    header = bytearray(_BLANK_HEADER)
    header[: len(name)] = name
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum counts itself as blanks
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _tar(prompts: Sequence[Prompt]) -> bytes:
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    pieces = []
    for prompt in prompts:
        data = encode({"text": prompt.text, "index": prompt.index, **prompt.metadata}).encode()
        if len(data) > MEMBER_BYTES:
            raise UserError(f"prompt {prompt.index} has {len(data)} bytes with its metadata; expected at most {MEMBER_BYTES}")
        pieces += [_header(b"%08d.json" % prompt.index, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    pieces.append(bytes(2 * tarfile.BLOCKSIZE))
    return b"".join(pieces)


def write_shards(prompts: Iterable[Prompt], directory: str | Path, name: str, *, shard_size: int = SHARD_SIZE) -> SetEntry:
    """Write one prompt set as `directory/name-00000.tar.gz` and so on, in the given order.

    Args:
        prompts: with distinct indices and JSON metadata; consumed one shard at a time.
        directory: created if missing.
        name: of the set; letters, digits, `_`, `-`.
        shard_size: prompts in every shard but the last.
    Returns: the set's entry for `write_index`.
    Raises: UserError for an empty text or an index that occurs twice.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    total = 0
    seen: dict[int, int] = {}  # indices as bits, 1,024 to an entry: a million prompts of one set in a third of a megabyte
    remaining = iter(prompts)
    while chunk := list(itertools.islice(remaining, shard_size)):
        for prompt in chunk:
            if not prompt.text.strip():
                raise UserError(
                    f"prompt {prompt.index} of set {name!r} is empty; every prompt needs a text, remove it or fill it in"
                )
            page, bit = divmod(prompt.index, 1024)
            if seen.get(page, 0) >> bit & 1:
                raise UserError(
                    f"prompt index {prompt.index} occurs twice in set {name!r}; indices key the noise, make them distinct"
                )
            if not prompt.metadata.keys().isdisjoint(("text", "index")):
                raise UserError(f"prompt {prompt.index} of set {name!r} has 'text' or 'index' in its metadata; rename that field")
            seen[page] = seen.get(page, 0) | 1 << bit
        total += len(chunk)
        buffer = io.BytesIO()
        # No file name and no time in the header: the bytes depend on the prompts alone.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=buffer, mtime=0) as stream:
            stream.write(_tar(chunk))
        data = buffer.getvalue()
        file = f"{name}-{len(shards):05d}.tar.gz"
        (directory / file).write_bytes(data)
        shards.append(ShardEntry(file=file, count=len(chunk), bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return SetEntry(total=total, shards=shards)


def write_index(directory: str | Path, sets: dict[str, SetEntry], version: str) -> Path:
    """Write `directory/index.json`, last of all files, so that an index speaks of finished shards only. Returns its path."""
    path = Path(directory) / INDEX
    temporary = path.with_suffix(".json.part")
    temporary.write_text(Index(version=version, sets=sets).model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_index(path: str | Path) -> Index:
    """Raises: UserError naming the file if it is missing or is no index."""
    return index_of(LocalDirectory(Path(path).parent))


def index_of(directory: Directory) -> Index:
    """Raises: UserError naming the file if it is missing or is no index."""
    path = directory.place(INDEX)
    try:
        content = directory.document(INDEX)
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        refuse_other(path, content[:1024])
        return Index.model_validate_json(content)
    except OSError as error:
        raise UserError(
            f"prompt index {path} cannot be read ({error.strerror}); expected a directory built by 'prdp shards build'"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise UserError(f"prompt index {path} is damaged: {where}: {first['msg']}; build the directory again") from error


MOST_UNPACKED = 1 << 30  # bytes of one shard, whatever its index says


def unpack(data: bytes, count: int) -> bytes:
    """The tar in a shard's bytes, with no more in it than `count` prompts can be.

    Raises: ValueError for more than that, for packing other than gzip, and for a member that unpacks to more than it holds;
        OSError, EOFError, zlib.error for a damaged one.
    """
    if data[:2] == b"\x1f\x8b":
        # Each prompt may take a header of extended attributes too. The end is padded to whole records.
        most = min(MOST_UNPACKED, count * (MEMBER_BYTES + 4 * tarfile.BLOCKSIZE) + 2 * tarfile.RECORDSIZE)
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:  # read to its end, so that the checksum there is checked
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it unpacks to more than {most} bytes, all that {count} prompts can be")
    if data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00\x00\x80")):
        raise ValueError("it is packed once more, or not with gzip")
    position = 0
    while header := data[position : position + tarfile.BLOCKSIZE].rstrip(b"\0"):
        try:
            size = tarfile.nti(header[124:136])  # type: ignore[attr-defined]
        except (tarfile.HeaderError, IndexError) as error:  # the second of a header that is cut off
            raise ValueError(f"it is no tar ({error})") from error
        kind, end = header[156:157], position + tarfile.BLOCKSIZE + max(size, 0)
        if kind == b"S" or (kind in (b"x", b"g") and b"GNU.sparse" in data[position:end]):
            raise ValueError("it has a sparse member")
        position = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return data


def _order(text: str, salt: bytes) -> bytes:
    """A sort key that shuffles: the same on every machine and with every version of every library."""
    return hashlib.blake2b(text.encode(), digest_size=8, key=salt).digest()


# ---------------------------------------------------------------------------------------------------------------- scenes
def scenes_version() -> str:
    """Format and a digest of the grammar: any change of the drawn world makes new shards."""
    first, last = (scenes.scene_at(index).prompt() for index in (0, scenes.NUM_SCENES - 1))
    grammar = [
        scenes.SIZES, scenes.COLOURS, scenes.SHAPES, scenes.ROWS, scenes.COLUMNS,
        sorted(scenes.HELD_OUT_BINDINGS), scenes.HELD_OUT_COMBINATIONS, EVAL_SIZE, SHARD_SIZE, first, last,
    ]  # fmt: skip
    return f"{FORMAT}-{hashlib.blake2b(json.dumps(grammar).encode(), digest_size=4).hexdigest()}"


def build_scene_shards(directory: str | Path) -> Path:
    """Write the drawn world: sets `train`, `seen_eval` and `unseen_eval`.

    `seen_eval` is 2,048 prompts of `train`; `unseen_eval` is 1,024 prompts of the split unseen_combination and as many of
    unseen_binding. A prompt's index is its scene number.

    Returns: the path of index.json.
    """
    by_split: dict[str, list[Prompt]] = {"train": [], "unseen_combination": [], "unseen_binding": []}
    for index in range(scenes.NUM_SCENES):
        scene = scenes.scene_at(index)
        split = scenes.split_of(scene)
        by_split[split].append(Prompt(index, scene.prompt(), {"split": split}))

    def shuffled(prompts: Iterable[Prompt], salt: bytes) -> list[Prompt]:
        return sorted(prompts, key=lambda prompt: _order(prompt.text, salt))

    unseen = [shuffled(by_split[split], b"eval")[: EVAL_SIZE // 2] for split in ("unseen_combination", "unseen_binding")]
    sets = {
        "train": shuffled(by_split["train"], b"train"),
        "seen_eval": shuffled(by_split["train"], b"eval")[:EVAL_SIZE],
        "unseen_eval": shuffled(itertools.chain(*unseen), b"eval"),
    }
    entries = {name: write_shards(prompts, directory, name) for name, prompts in sets.items()}
    return write_index(directory, entries, scenes_version())


# --------------------------------------------------------------------------------------------------------------- animals
def animals_version() -> str:
    """Format and a digest of the prompts: any change of the lists or the template makes new shards."""
    texts = {name: [prompt.text for prompt in prompts] for name, prompts in animals.animal_sets().items()}
    return f"{FORMAT}-{hashlib.blake2b(json.dumps(texts).encode(), digest_size=4).hexdigest()}"


def build_animal_shards(directory: str | Path) -> Path:
    """Write the 45 animals of the papers, and 45 unseen ones. Returns: the path of index.json."""
    entries = {
        name: write_shards(sorted(prompts, key=lambda prompt: _order(prompt.text, b"animals")), directory, name)
        for name, prompts in animals.animal_sets().items()
    }
    return write_index(directory, entries, animals_version())


# ------------------------------------------------------------------------------------------------------------ text files
def _read_bytes(txt_file: Path) -> bytes:
    try:
        content = txt_file.read_bytes()
    except OSError as error:
        raise UserError(
            f"prompt file {txt_file} cannot be read ({error.strerror}); expected a text file of one prompt a line"
        ) from error
    refuse_other(txt_file, content[:1024])
    return content


def _text_version(content: bytes) -> str:
    return f"{FORMAT}.{TEXT_FORMAT}-{hashlib.sha256(content).hexdigest()[:16]}"


def _build_text(txt_file: Path, content: bytes, directory: str | Path) -> Path:
    try:
        encoding = encoding_of_bytes(content)
        lines = re.split("\r\n|\r|\n", content.decode(encoding))
    except UnicodeDecodeError as error:
        line = len(re.findall(b"\r\n|\r|\n", content[: error.start])) + 1
        name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        raise UserError(
            f"prompt file {txt_file} is not {name} in line {line}; save it as UTF-8 text of one prompt a line"
        ) from error
    broken = next((number for number, line in enumerate(lines, start=1) if "\0" in line), None)
    if broken is not None:
        raise UserError(
            f"prompt file {txt_file} has a zero byte in line {broken}, as no text has; save it as UTF-8 text of one prompt a "
            "line, or build a directory with 'prdp shards build', which leaves such lines out"
        )
    prompts = [Prompt(number, text.strip(), {}) for number, text in enumerate(lines) if text.strip()]
    if not prompts:
        raise UserError(f"prompt file {txt_file} holds no prompts; expected one prompt a line")
    prompts.sort(key=lambda prompt: (_order(prompt.text, b"text"), prompt.index))
    return write_index(directory, {TEXT_SET: write_shards(prompts, directory, TEXT_SET)}, _text_version(content))


def build_text_shards(txt_file: str | Path, directory: str | Path) -> Path:
    """Write a UTF-8 text file of one prompt a line as the set `train`. Blank lines are skipped.

    A prompt's index is its line number, counted from 0 with the blank lines.

    Returns: the path of index.json.
    Raises: UserError naming the file if it cannot be read, is not UTF-8 or holds no prompts.
    """
    return _build_text(Path(txt_file), _read_bytes(Path(txt_file)), directory)


# ----------------------------------------------------------------------------------------------------------------- cache
def _complete(directory: Path) -> bool:
    try:
        index = read_index(directory / INDEX)
        return all((directory / s.file).stat().st_size == s.bytes for entry in index.sets.values() for s in entry.shards)
    except (UserError, OSError):
        return False


def _ensure(directory: Path, build: Callable[[Path], object]) -> Path:
    """Build `directory` unless it is complete. Any number of processes may do so at once: the first to finish wins."""
    if _complete(directory):
        return directory / INDEX
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise UserError(
            f"prompt cache {directory.parent} cannot be written ({error.strerror}); set PRDP_CACHE to a directory that can"
        ) from error
    try:
        build(work / "new")
        while True:
            # A rename onto a directory that holds files fails, so finished work is never overwritten.
            try:
                os.rename(work / "new", directory)
                break
            except OSError:
                if _complete(directory):
                    break
                if not directory.exists():
                    raise
            with contextlib.suppress(FileNotFoundError):  # another process may have moved the damaged one first
                os.rename(directory, Path(tempfile.mkdtemp(dir=work)) / "damaged")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory / INDEX


def ensure_scene_shards(cache_dir: str | Path | None = None) -> Path:
    """The shards of the drawn world, built on first use (a few seconds).

    Args:
        cache_dir: default `default_cache_dir()`.
    Returns: the path of index.json in `cache_dir/prompts/scenes-<version>`.
    Raises: UserError if the cache cannot be written.
    """
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return _ensure(root / "prompts" / f"scenes-{scenes_version()}", build_scene_shards)


def ensure_animal_shards(cache_dir: str | Path | None = None) -> Path:
    """The shards of the animals, built on first use.

    Returns: the path of index.json in `cache_dir/prompts/animals-<version>`.
    Raises: UserError if the cache cannot be written.
    """
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return _ensure(root / "prompts" / f"animals-{animals_version()}", build_animal_shards)


def ensure_text_shards(txt_file: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The shards of a text file, built on first use and found again by the file's content.

    Returns: the path of index.json in `cache_dir/prompts/text-<version>`.
    Raises: UserError, as `build_text_shards`, or if the cache cannot be written.
    """
    txt_file = Path(txt_file)
    content = _read_bytes(txt_file)
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    directory = root / "prompts" / f"text-{_text_version(content)}"
    return _ensure(directory, lambda target: _build_text(txt_file, content, target))
