"""Text embeddings beside the shards, so that a run need not encode its prompts.

    embeddings.json                 the shards they belong to, the model's name, names and shapes, files with bytes and SHA-256
    embeddings-00000.safetensors    1,000 prompts: every tensor of TextEmbeddings that has a row per prompt, float16; "index"
                                    (int64) and "text" (int64), the prompts' numbers and a hash of their texts
    embeddings-index.safetensors    "index" and "text" of all files one after the other, and "rows" (int64), how many each has
    embeddings-empty.safetensors    the tensors that all rows share: what the empty prompt has, and SDXL's picture size

A prompt of several sets is there once. A row of Stable Diffusion (77 x 768) takes 118 KB, so 100,000 prompts take 12 GB. Rows are
read one by one from mapped files: memory is 20 bytes a prompt and the rows asked for. From a URL only those files are fetched
whose rows are asked for.

Of T5 at 512 tokens a row takes 4 MB.

float16 keeps 11 bits of an embedding, more than the bfloat16 that a GPU run computes in, fewer than float32.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from prdp_fast.core.digest import DIGITS
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json
from prdp_fast.core.records import Prompt, TextEmbeddings
from prdp_fast.prompts.directory import Directory, LocalDirectory, open_directory
from prdp_fast.prompts.shards import BARE_NAME, INDEX, SHA256, index_of, read_index
from prdp_fast.prompts.stream import PromptSet

MANIFEST = "embeddings.json"
EMPTY = "embeddings-empty.safetensors"
ROWS = "embeddings-index.safetensors"
PER_FILE = 1000  # prompts
FILE_BYTES = 2**28  # and no more, beyond the batch that passes it: a prompt of T5 takes megabytes
PROBES = 4  # prompts that a run's own encoder is compared on
AGAIN = "run 'prdp embed' again"
TOLERANCE = 0.02  # of the largest embedding value; float16 and bfloat16 encoders differ by 0.005, other models by about 1

Encode = Callable[[list[Prompt]], TextEmbeddings]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: str = Field(pattern=BARE_NAME)
    bytes: NonNegativeInt
    sha256: str = Field(pattern=SHA256)


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: str  # of the index
    model: str
    encoder: str | None = None  # digest of the text encoders and tokenizers; files of earlier versions have none
    shapes: dict[str, list[int]]  # of one row
    prompts: int
    files: list[_File]


def _is_shared(field: str) -> bool:
    return field.startswith("negative_") or field == "time_ids"


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _write(directory: Path, file: str, tensors: dict[str, torch.Tensor]) -> _File:
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    (directory / file).write_bytes(data)
    return _File(file=file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _half(tensor: torch.Tensor, name: str) -> torch.Tensor:
    half = tensor.detach().to("cpu", torch.float16)
    if not half.isfinite().all():
        raise UserError(f"{name} has values that float16 cannot hold; encode while training instead")
    return half


def _all_prompts(directory: Path) -> Iterator[Prompt]:
    """Every prompt of every set once."""
    seen: dict[int, int] = {}
    for name, entry in read_index(directory / INDEX).sets.items():
        if entry.total:
            for prompt in PromptSet.open(directory, name):
                page, bit = divmod(prompt.index, 1024)
                if not seen.get(page, 0) >> bit & 1:
                    seen[page] = seen.get(page, 0) | 1 << bit
                    yield prompt


def write_embeddings(
    directory: str | Path, encode: Encode, *, model: str, batch: int = 64, per_file: int = PER_FILE, encoder: str | None = None
) -> Path:
    """Encode every prompt of a directory. Embeddings that are there are replaced.

    Args:
        encode: prompts to embeddings, e.g. `prdp_fast.models.text.TextEncoder.encode`.
        model: its name, for people.
        batch: prompts encoded at once.
        per_file: a multiple of `batch`, or the last batch of a file is smaller.
        encoder: digest of what encodes, by which a run knows that it need not load it.
    Returns: the path of embeddings.json, written last.
    Raises: UserError if the directory is damaged or an embedding does not fit float16.
    """
    directory = Path(directory)
    version = read_index(directory / INDEX).version
    (directory / MANIFEST).unlink(missing_ok=True)
    for old in directory.glob("embeddings-*.safetensors"):
        old.unlink()
    files: list[_File] = []
    shapes: dict[str, list[int]] = {}
    pieces: dict[str, list[torch.Tensor]] = {}
    prompts: list[Prompt] = []
    waiting: list[Prompt] = []
    total = 0

    def encode_waiting() -> None:
        for name, tensor in encode(waiting)._asdict().items():
            if tensor is None:
                continue
            if not _is_shared(name):
                pieces.setdefault(name, []).append(_half(tensor, name))
            elif not files and not prompts:
                shared[name] = _half(tensor, name)
        prompts.extend(waiting)
        waiting.clear()

    def flush() -> None:
        tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
        shapes.update({name: list(tensor.shape[1:]) for name, tensor in tensors.items()})
        tensors["index"] = torch.tensor([prompt.index for prompt in prompts])
        tensors["text"] = torch.tensor([_text_hash(prompt.text) for prompt in prompts])
        indices.append(tensors["index"])
        hashes.append(tensors["text"])
        files.append(_write(directory, f"embeddings-{len(files):05d}.safetensors", tensors))
        pieces.clear()
        prompts.clear()

    shared: dict[str, torch.Tensor] = {}
    indices: list[torch.Tensor] = []
    hashes: list[torch.Tensor] = []
    for prompt in _all_prompts(directory):
        waiting.append(prompt)
        total += 1
        if len(waiting) == batch or len(prompts) + len(waiting) == per_file:
            encode_waiting()
        if len(prompts) == per_file or sum(part.nbytes for parts in pieces.values() for part in parts) >= FILE_BYTES:
            flush()
    if waiting:
        encode_waiting()
    if prompts:
        flush()
    if not files:
        raise UserError(f"{directory} has no prompts to encode; build it from at least one")
    rows = {"index": torch.cat(indices), "text": torch.cat(hashes), "rows": torch.tensor(list(map(len, indices)))}
    files += [_write(directory, ROWS, rows), _write(directory, EMPTY, shared)]
    manifest = Manifest(version=version, model=model, encoder=encoder, shapes=shapes, prompts=total, files=files)
    write_json(directory / MANIFEST, manifest.model_dump())
    return directory / MANIFEST


class StoredEmbeddings:
    """The embeddings of a prompt directory."""

    def __init__(self, directory: Directory, manifest: Manifest) -> None:
        """Use `open`."""
        self.directory, self.manifest = directory, manifest
        by_name = {entry.file: entry for entry in manifest.files}
        self._files = [entry for name, entry in by_name.items() if name not in (EMPTY, ROWS)]
        if ROWS in by_name:
            with self._opened(by_name[ROWS]) as tensors:
                index, hashes, rows = (tensors.get_tensor(name).numpy() for name in ("index", "text", "rows"))
        elif isinstance(directory, LocalDirectory):  # of an earlier version: every file has to be opened
            index, hashes, rows = self._all_rows()
        else:
            raise UserError(f"{directory.place(MANIFEST)} names no {ROWS}; {AGAIN}")
        order = np.argsort(index, kind="stable")
        self._index, self._hash = index[order], hashes[order]
        numbers = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
        inside = np.concatenate([np.arange(count, dtype=np.int32) for count in rows])
        self._place = np.stack([numbers, inside], 1)[order]
        with self._opened(by_name[EMPTY]) as tensors:
            self._shared = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)

    @classmethod
    def open(cls, directory: str | Path | Directory) -> StoredEmbeddings | None:
        """The embeddings of a directory, or None if it has none.

        Raises: UserError if they are damaged or were made for other prompts.
        """
        if isinstance(directory, (str, Path)):
            directory = open_directory(directory)
        place = directory.place(MANIFEST)
        try:
            content = directory.document(MANIFEST)
            if content is None:
                return None
            manifest = Manifest.model_validate_json(content)
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise UserError(f"{place} cannot be read ({reason}); {AGAIN}") from error
        version = index_of(directory).version
        if manifest.version != version:
            raise UserError(f"{place} is of prompts {manifest.version}, the shards are {version}; {AGAIN}")
        if isinstance(directory, LocalDirectory):
            for entry in manifest.files:
                path = directory.path / entry.file
                if not path.is_file() or path.stat().st_size != entry.bytes:
                    raise UserError(f"{path} is missing or has another size than {MANIFEST} says; {AGAIN}")
        return cls(directory, manifest)

    @contextlib.contextmanager
    def _opened(self, entry: _File) -> Iterator[Any]:
        with self.directory.file(entry) as path:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.directory.place(entry.file)} cannot be read ({error}); {AGAIN}") from error
            with file as tensors:
                yield tensors

    def _all_rows(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        indices, hashes = [], []
        for entry in self._files:
            with self._opened(entry) as tensors:
                indices.append(tensors.get_tensor("index").numpy())
                hashes.append(tensors.get_tensor("text").numpy())
        return np.concatenate(indices), np.concatenate(hashes), list(map(len, indices))

    def __len__(self) -> int:
        return len(self._index)

    def rows(self, prompts: list[Prompt]) -> TextEmbeddings:
        """One row per prompt, in the given order; float16 on the CPU.

        Raises: UserError if a prompt is not there, or has another text than when it was encoded.
        """
        wanted = np.array([prompt.index for prompt in prompts], dtype=np.int64)
        found = np.minimum(np.searchsorted(self._index, wanted), len(self._index) - 1)
        hashes = np.array([_text_hash(prompt.text) for prompt in prompts], dtype=np.int64)
        wrong = np.flatnonzero((self._index[found] != wanted) | (self._hash[found] != hashes))
        if len(wrong):
            prompt = prompts[wrong[0]]
            raise UserError(
                f"{self.directory.place(MANIFEST)} has no embedding of prompt {prompt.index}, {prompt.text!r}; {AGAIN}"
            )
        tensors = {name: torch.empty(len(prompts), *shape, dtype=torch.float16) for name, shape in self.manifest.shapes.items()}
        places = self._place[found]
        for number in np.unique(places[:, 0]):
            with self._opened(self._files[number]) as file:
                slices = {name: file.get_slice(name) for name in tensors}
                for target in np.flatnonzero(places[:, 0] == number):
                    row = int(places[target, 1])
                    for name, tensor in tensors.items():
                        tensor[target] = slices[name][row : row + 1][0]
        return TextEmbeddings(**tensors, **self._shared)

    def encoder(self, device: torch.device, dtype: torch.dtype) -> Encode:
        """What takes a text encoder's place: rows on this device, in this dtype."""

        def encode(prompts: list[Prompt]) -> TextEmbeddings:
            rows = self.rows(prompts)
            return TextEmbeddings(*(None if tensor is None else tensor.to(device, dtype) for tensor in rows))

        return encode

    def is_of(self, encoder: str, tokens: int) -> bool:
        """Whether they were made by this encoder, at so many tokens a prompt: then nothing is to be compared, or loaded."""
        return self.manifest.encoder == encoder and self.manifest.shapes["prompt_embeds"][0] == tokens

    def check(self, encode: Encode, prompts: list[Prompt]) -> None:
        """Compare with an encoder on the first of `prompts`. Raises: UserError if it is another model's."""
        probes = prompts[:PROBES]
        for name, stored in self.rows(probes)._asdict().items():
            if stored is None:
                continue
            fresh = getattr(encode(probes), name).detach().to("cpu", torch.float32)
            difference = (fresh - stored.float()).abs().max().item() if fresh.shape == stored.shape else float("inf")
            if not difference <= TOLERANCE * fresh.abs().max().item():
                own, kept = (" x ".join(map(str, tensor.shape[1:])) for tensor in (fresh, stored))
                shapes = f"in shape ({own}, where {kept} is stored: see --max-sequence-length)"
                how = f"by {difference:.3g}" if fresh.shape == stored.shape else shapes
                raise UserError(
                    f"{self.directory.place(MANIFEST)} was made with {self.manifest.model!r}, and this model's {name} differ "
                    f"{how}; run 'prdp embed' with this model, or remove the embeddings"
                )


def has_embeddings(directory: Directory) -> bool:
    """Raises: OSError, UserError."""
    return directory.document(MANIFEST) is not None


def embeddings_digest(directory: Directory) -> str:
    """Of all that is stored beside a directory's shards, by its manifest. Raises: OSError, UserError."""
    content = directory.document(MANIFEST)
    if content is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory.place(MANIFEST))
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def embedding_faults(directory: Directory) -> list[str]:
    """What `verify` has to say of a directory's embeddings: nothing if there are none or all is well."""
    try:
        stored = StoredEmbeddings.open(directory)
        return [] if stored is None else [
            f"{entry.file}: SHA-256 differs from the one in {MANIFEST}"
            for entry in stored.manifest.files
            if hashlib.sha256(directory.read(entry)).hexdigest() != entry.sha256
        ]  # fmt: skip
    except UserError as error:
        return [str(error)]


def choose_encoder(
    encode: Encode, prompt_set: PromptSet, *, stored: bool, device: torch.device, dtype: torch.dtype, known: bool = False
) -> Encode:
    """Prompts to embeddings: the pipeline's encoder, or what it left beside the shards.

    Args:
        encode: the pipeline's own.
        stored: whether to read the stored embeddings of `prompt_set`.
        device, dtype: of what is read.
        known: the stored ones are this encoder's, see `StoredEmbeddings.is_of`, and it need not be there.
    Raises: UserError if the stored ones are another model's.
    """
    found = StoredEmbeddings.open(prompt_set.directory) if stored else None
    if found is None:
        return encode
    if not known:
        found.check(encode, list(itertools.islice(prompt_set, PROBES)))
    return found.encoder(device, dtype)
