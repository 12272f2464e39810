"""Text embeddings beside the shards, so that a run need not encode its prompts.

    embeddings.json                 the shards they belong to, the model's name, names and shapes, files with bytes and SHA-256
    embeddings-00000.safetensors    1,000 prompts: every tensor of TextEmbeddings that has a row per prompt, float16; "index"
                                    (int64) and "text" (int64), the prompts' numbers and a hash of their texts
    embeddings-empty.safetensors    the tensors that all rows share: what the empty prompt has, and SDXL's picture size

A prompt of several sets is there once. A row of Stable Diffusion (77 x 768) takes 118 KB, so 100,000 prompts take 12 GB. Rows are
read one by one from mapped files: memory is 20 bytes a prompt and the rows asked for.

Of T5 at 512 tokens a row takes 4 MB.

float16 keeps 11 bits of an embedding, more than the bfloat16 that a GPU run computes in, fewer than float32.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json
from prdp_fast.core.records import Prompt, TextEmbeddings
from prdp_fast.prompts.shards import INDEX, read_index
from prdp_fast.prompts.stream import PromptSet

MANIFEST = "embeddings.json"
EMPTY = "embeddings-empty.safetensors"
PER_FILE = 1000  # prompts
FILE_BYTES = 2**28  # and no more, beyond the batch that passes it: a prompt of T5 takes megabytes
PROBES = 4  # prompts that a run's own encoder is compared on
TOLERANCE = 0.02  # of the largest embedding value; float16 and bfloat16 encoders differ by 0.005, other models by about 1

Encode = Callable[[list[Prompt]], TextEmbeddings]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: str
    bytes: int
    sha256: str


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
        files.append(_write(directory, f"embeddings-{len(files):05d}.safetensors", tensors))
        pieces.clear()
        prompts.clear()

    shared: dict[str, torch.Tensor] = {}
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
    files.append(_write(directory, EMPTY, shared))
    manifest = Manifest(version=version, model=model, encoder=encoder, shapes=shapes, prompts=total, files=files)
    write_json(directory / MANIFEST, manifest.model_dump())
    return directory / MANIFEST


class StoredEmbeddings:
    """The embeddings of a prompt directory."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Use `open`."""
        self.directory, self.manifest = directory, manifest
        self._files = [entry.file for entry in manifest.files if entry.file != EMPTY]
        indices, hashes, places = [], [], []
        for number, file in enumerate(self._files):
            with self._opened(file) as tensors:
                index = tensors.get_tensor("index").numpy()
                indices.append(index)
                hashes.append(tensors.get_tensor("text").numpy())
                places.append(np.stack([np.full(len(index), number, np.int32), np.arange(len(index), dtype=np.int32)], 1))
        order = np.argsort(np.concatenate(indices), kind="stable")
        self._index = np.concatenate(indices)[order]
        self._hash = np.concatenate(hashes)[order]
        self._place = np.concatenate(places)[order]
        with self._opened(EMPTY) as tensors:
            self._shared = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)

    @classmethod
    def open(cls, directory: str | Path) -> StoredEmbeddings | None:
        """The embeddings of a directory, or None if it has none.

        Raises: UserError if they are damaged or were made for other prompts.
        """
        directory = Path(directory)
        if not (directory / MANIFEST).is_file():
            return None
        again = "run 'prdp embed' again"
        try:
            manifest = Manifest.model_validate_json((directory / MANIFEST).read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise UserError(f"{directory / MANIFEST} cannot be read ({reason}); {again}") from error
        version = read_index(directory / INDEX).version
        if manifest.version != version:
            raise UserError(f"{directory / MANIFEST} is of prompts {manifest.version}, the shards are {version}; {again}")
        for entry in manifest.files:
            path = directory / entry.file
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise UserError(f"{path} is missing or has another size than {MANIFEST} says; {again}")
        return cls(directory, manifest)

    def _opened(self, file: str):  # type: ignore[no-untyped-def]
        try:
            return safe_open(self.directory / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.directory / file} cannot be read ({error}); run 'prdp embed' again") from error

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
                f"{self.directory / MANIFEST} has no embedding of prompt {prompt.index}, {prompt.text!r}; run 'prdp embed' again"
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
                    f"{self.directory / MANIFEST} was made with {self.manifest.model!r}, and this model's {name} differ {how}; "
                    "run 'prdp embed' with this model, or remove the embeddings"
                )


def has_embeddings(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def embedding_faults(directory: Path) -> list[str]:
    """What `verify` has to say of a directory's embeddings: nothing if there are none or all is well."""
    if not has_embeddings(directory):
        return []
    try:
        stored = StoredEmbeddings.open(directory)
    except UserError as error:
        return [str(error)]
    assert stored is not None
    return [
        f"{entry.file}: SHA-256 differs from the one in {MANIFEST}"
        for entry in stored.manifest.files
        if hashlib.sha256((directory / entry.file).read_bytes()).hexdigest() != entry.sha256
    ]


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
