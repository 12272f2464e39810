"""Look at a prompt directory from outside: what is in it, and whether all that its index says is true."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset import tariterators

from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import clean
from prdp_fast.prompts.directory import Directory, LocalDirectory, open_directory
from prdp_fast.prompts.embeddings import embedding_faults
from prdp_fast.prompts.shards import INDEX, SetEntry, ShardEntry, index_of, unpack
from prdp_fast.prompts.stream import UNREADABLE, prompt_of

SEEN, UNSEEN, TRAIN = "seen", "unseen", "train"  # how the names of sets start that are part of train, or apart from it


class SetSummary(NamedTuple):
    name: str
    prompts: int
    shards: int
    bytes: int
    examples: list[str]


def describe(source: str | Path, examples: int = 3) -> tuple[str, list[SetSummary]]:
    """Version and sets of a prompt directory, with their first prompts.

    Args: source: the directory, or its URL.
    Raises: UserError if it has no readable index.
    """
    directory = open_directory(source)
    index = index_of(directory)
    found = []
    for name, entry in index.sets.items():
        texts: list[str] = []
        for shard in entry.shards[:1]:
            try:
                members = _members(directory.read(shard), shard)
                texts = [prompt.text for _, prompt in itertools.islice(members, examples)]
            except UNREADABLE:
                texts = ["(cannot be read; see 'prdp shards verify')"]
        found.append(SetSummary(name, entry.total, len(entry.shards), sum(shard.bytes for shard in entry.shards), texts))
    return index.version, found


def _members(content: bytes, shard: ShardEntry) -> Iterator[tuple[str, Prompt]]:
    """Name and prompt of every member. Raises: one of UNREADABLE, also for a member that is no prompt."""
    data = unpack(content, shard.count)
    for member in tariterators.tar_file_expander([{"url": shard.file, "stream": io.BytesIO(data)}], eof_value=None):
        name: Any = member["fname"]
        if not name.endswith(".json"):
            raise ValueError(f"member {name} is no prompt")
        yield name, prompt_of(json.loads(member["data"]), name)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(clean.comparable(clean.tidy(text)).encode(), digest_size=8).digest(), "little")


def _shard_faults(directory: Directory, shard: ShardEntry, hashes: list[np.ndarray], indices: list[np.ndarray]) -> Iterator[str]:
    """Yields faults; adds the shard's text hashes and indices to the lists."""
    try:
        data = directory.read(shard)
    except OSError as error:
        yield f"{shard.file}: missing ({error.strerror})"
        return
    except UserError as error:
        yield str(error)
        return
    if len(data) != shard.bytes:
        cut_off = "or more " if len(data) > shard.bytes and not isinstance(directory, LocalDirectory) else ""
        yield f"{shard.file}: {len(data)} {cut_off}bytes, {INDEX} says {shard.bytes}"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield f"{shard.file}: SHA-256 differs from the one in {INDEX}"
    try:
        members = list(_members(data, shard))
    except UNREADABLE as error:
        yield f"{shard.file}: cannot be read ({type(error).__name__}: {error})"
        return
    if len(members) != shard.count:
        yield f"{shard.file}: {len(members)} prompts, {INDEX} says {shard.count}"
    wrong = [member for member, prompt in members if member != f"{prompt.index:08d}.json"]
    if wrong:
        yield f"{shard.file}: member {wrong[0]} and {len(wrong) - 1} more are not named by their index"
    hashes.append(np.array([_hash(prompt.text) for _, prompt in members], dtype=np.uint64))
    indices.append(np.array([prompt.index for _, prompt in members], dtype=np.int64))


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _example(directory: Directory, entry: SetEntry, wanted: np.ndarray) -> str:
    """A text whose hash is the first of `wanted`."""
    for shard in entry.shards:
        for _, prompt in _members(directory.read(shard), shard):
            if _hash(prompt.text) == int(wanted[0]):
                return repr(prompt.text)
    return "one that cannot be read any more"


def verify(source: str | Path) -> list[str]:
    """Every fault of a prompt directory, one line each. What lies behind a URL is fetched, whatever the cache has of it.

    Checked: files against the index (presence, bytes, SHA-256, number of prompts), archives and their members, indices and texts
    that occur twice in a set, prompts of unseen sets in `train`, prompts of seen sets that `train` lacks, shards that no index
    names, stored embeddings. Texts are compared without case and white space. Memory: a shard, and some 50 bytes a prompt.

    Args: source: the directory, or its URL.
    Raises: UserError if there is no index at all.
    """
    directory = open_directory(source)
    if isinstance(directory, LocalDirectory) and not (directory.path / INDEX).is_file():
        raise UserError(f"{directory} is no prompt directory ({INDEX} is missing); expected one built by 'prdp shards build'")
    try:
        sets = index_of(directory).sets
    except UserError as error:
        return [str(error)]
    faults: list[str] = []
    hashes: dict[str, np.ndarray] = {}
    for name, entry in sets.items():
        text_hashes: list[np.ndarray] = []
        indices: list[np.ndarray] = []
        for shard in entry.shards:
            faults += _shard_faults(directory, shard, text_hashes, indices)
        hashes[name] = _joined(text_hashes, np.uint64)
        values, counts = np.unique(hashes[name], return_counts=True)
        if len(values) < len(hashes[name]):
            example = _example(directory, entry, values[counts > 1])
            faults.append(f"set {name}: {len(hashes[name]) - len(values)} prompts occur again, e.g. {example}")
        values, counts = np.unique(_joined(indices, np.int64), return_counts=True)
        if (counts > 1).any():
            faults.append(f"set {name}: {int((counts > 1).sum())} indices occur more than once, e.g. {values[counts > 1][0]}")
    for name, entry in sets.items():
        if TRAIN not in sets or not len(hashes[name]):
            continue
        if name.startswith(UNSEEN):
            leaked = np.intersect1d(hashes[name], hashes[TRAIN])
            if len(leaked):
                faults.append(f"set {name}: {len(leaked)} prompts are in train too, e.g. {_example(directory, entry, leaked)}")
        elif name.startswith(SEEN):
            strange = np.setdiff1d(hashes[name], hashes[TRAIN])
            if len(strange):
                faults.append(f"set {name}: {len(strange)} prompts are not in train, e.g. {_example(directory, entry, strange)}")
    listed = {shard.file for entry in sets.values() for shard in entry.shards}
    if isinstance(directory, LocalDirectory):
        stray = sorted(path.name for path in directory.path.glob("*.tar*") if path.name not in listed)
    else:  # not every place can list its files
        stray = []
    faults += [f"{name}: not in {INDEX}" for name in stray]
    return faults + embedding_faults(directory)
