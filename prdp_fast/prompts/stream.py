"""Read prompt sets: one shard at a time, in an order that any epoch, rank and world size can compute for itself.

The global sequence of prompts is a function of the seed alone. Pass p over the set takes the shards in the order of a
permutation keyed by (seed, p) and the prompts of a shard in the order of one keyed by (seed, p, shard). Epoch e is the slice
[e n, (e + 1) n) of that sequence, and each rank takes its contiguous part of it. So a resumed run needs no state but its
epoch number, seeking skips whole shards by the counts in the index, and memory does not grow with the set.

Shards are read with WebDataset's tar iterators on files opened here: no URL, no shell, nothing decoded but JSON. Those behind a
URL are fetched into a cache first (`directory.py`), the next one while the present one is read.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
from webdataset import tariterators

from prdp_fast.config.recipe import PromptSettings
from prdp_fast.core.digest import content_sha256
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import shards as build
from prdp_fast.prompts.directory import CorruptFile, Directory, LocalDirectory, is_url, open_directory
from prdp_fast.prompts.files import refuse_other
from prdp_fast.prompts.shards import INDEX, SetEntry, ShardEntry, ensure_text_shards, index_of

SHIPPED = ("scenes", "animals")  # sources known by name: the drawn world; the papers' 45 animals
CHECKED_AT_OPEN = 64_000_000  # bytes: smaller sets have their digests checked before any work starts
_NAMED = " or ".join(f'"{name}"' for name in SHIPPED)
UNREADABLE = (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, KeyError, AssertionError)


def _decode_shard(path: Path, count: int) -> list[Prompt]:
    """Raises: one of UNREADABLE."""
    data = build.unpack(path.read_bytes(), count)
    files = tariterators.tar_file_expander(
        [{"url": path.name, "stream": io.BytesIO(data)}], select_files=lambda name: name.endswith(".json")
    )
    prompts = []
    for sample in tariterators.group_by_keys(files):
        prompts.append(prompt_of(json.loads(sample["json"]), f"{sample['__key__']}.json"))
    return prompts


def prompt_of(record: Any, member: str) -> Prompt:
    """The prompt in a decoded tar member. Raises: ValueError naming the member if it is none."""
    text, index = (record.pop(field, None) if isinstance(record, dict) else None for field in ("text", "index"))
    if not isinstance(text, str) or not text.strip() or type(index) is not int or index < 0:
        raise ValueError(f'member {member}: expected a non-empty "text" and an "index" from 0')
    return Prompt(index, text, record)


def _permutation(n: int, seed: int, *key: int) -> np.ndarray:
    """A permutation of n, keyed by (seed, *key). Sorted raw bits, because only the bit stream of a numpy generator is promised
    to stay the same from version to version, not what `Generator.permutation` makes of it."""
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(n)
    return np.argsort(bits, kind="stable")


class PromptSet:
    """A prompt set on disk or behind a URL. `len()` is its number of prompts, iteration yields them in stored order."""

    def __init__(
        self, directory: Directory, name: str, entry: SetEntry, *, limit: int | None = None, advice: str = "build it again"
    ) -> None:
        """Use `open`. `limit` keeps the first prompts only; `advice` is the next move when a shard turns out damaged."""
        self.directory = directory
        self.name = name
        self._advice = advice
        self._shards: list[ShardEntry] = []
        self.counts: list[int] = []  # prompts used of each shard
        left = entry.total if limit is None else min(limit, entry.total)
        for shard in entry.shards:
            if left > 0:
                self._shards.append(shard)
                self.counts.append(min(left, shard.count))
                left -= shard.count
        self._cache: OrderedDict[int, list[Prompt]] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """Of what the set holds, so that a run can tell whether its directory was rebuilt; 16 hexadecimal digits."""
        content = "".join(f"{shard.sha256} {count}\n" for shard, count in zip(self._shards, self.counts, strict=True))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def open(
        cls,
        source: str | Path,
        name: str,
        limit: int | None = None,
        *,
        settings: PromptSettings | None = None,
        damage: Literal["stop", "skip"] = "stop",
    ) -> PromptSet:
        """Open a prompt set and check that its files are there and, below 64 MB, that they are undamaged.

        Of a URL the index alone is read. A shard is checked when it has been fetched.

        Args:
            source: "scenes" (the embedded world), "animals" (the papers' 45), a directory that holds index.json, its URL, or a
                .txt file of one prompt a line. Named sources and text files are built into the cache on first use.
            name: of the set, e.g. "train"; a text file has "train" only.
            limit: keep this many prompts at most, always the same ones.
            settings: of the cache and the patience for a URL; default: those of a recipe that says nothing.
            damage: "skip" leaves it to the caller to look for damaged shards, see `corrupt_shards`.
        Raises: UserError in one line naming the file at fault and the next move.
        """
        source = str(source)
        path = Path(source).expanduser()
        cached = True
        if source in SHIPPED:
            index_path = build.ensure_scene_shards() if source == "scenes" else build.ensure_animal_shards()
        elif is_url(source):
            index_path, cached = None, False
        elif path.suffix == ".txt":
            index_path = ensure_text_shards(path)
        elif path.is_dir():
            index_path, cached = path / INDEX, False
        else:
            problem = "is neither a directory nor a .txt file" if path.exists() else "does not exist"
            raise UserError(
                f"prompt source {source!r} {problem}; expected {_NAMED}, a directory that holds {INDEX}, its URL, or a .txt file"
            )
        directory = open_directory(source if index_path is None else index_path.parent, settings)
        sets = index_of(directory).sets
        if name not in sets:
            near = get_close_matches(name, sets, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"prompt set {name!r} is not in {source!r}; it has {', '.join(map(repr, sets)) or 'no sets'}{hint}")
        if limit is not None and limit < 1:
            raise UserError(f"prompt limit is {limit}; expected at least 1, or no limit")
        if sets[name].total == 0:
            raise UserError(f"prompt set {name!r} in {directory.place(INDEX)} is empty; build it from at least one prompt")
        advice = f"delete {directory} and run again" if cached else "rebuild the directory with 'prdp shards build'"
        prompt_set = cls(directory, name, sets[name], limit=limit, advice=advice)
        if isinstance(directory, LocalDirectory):
            prompt_set._check_files(directory.path, digests=damage == "stop")
        return prompt_set

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[Prompt]:
        for number in range(len(self._shards)):
            prompts = self.shard(number)
            if number + 1 < len(self._shards):
                self.fetch_ahead(number + 1)
            yield from prompts

    def fetch_ahead(self, number: int) -> None:
        """Have a shard that lies behind a URL fetched in the background, for it is the next one to be read."""
        self.directory.fetch_ahead(self._shards[number])

    def _check_files(self, directory: Path, *, digests: bool) -> None:
        for shard in self._shards:
            path = directory / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(f"prompt shard {path} is missing ({error.strerror}); {self._advice}") from error
            if size == 0 and digests:
                raise UserError(f"prompt shard {path} is empty; {self._advice}")
            if size != shard.bytes and size < 1024:
                refuse_other(path, path.read_bytes())
        if digests and sum(shard.bytes for shard in self._shards) < CHECKED_AT_OPEN:
            for shard in self._shards:
                self._check_digest(shard)

    def _check_digest(self, shard: ShardEntry) -> None:
        with self.directory.file(shard) as path:
            if content_sha256(path)[1] != shard.sha256:
                raise CorruptFile(f"prompt shard {path} is damaged or not the one in {INDEX} (SHA-256 differs); {self._advice}")

    def verify(self) -> None:
        """Read everything: digests, archives, JSON, counts. Raises: UserError naming the first damaged shard."""
        for shard in self._shards:
            self._check_digest(shard)
        for number in range(len(self._shards)):
            self._read(number)

    def corrupt_shards(self) -> list[str]:
        """Read everything, and name the shards that are damaged. Raises: UserError if one is not there or does not arrive."""
        found = []
        for number, shard in enumerate(self._shards):
            if number + 1 < len(self._shards):
                self.fetch_ahead(number + 1)
            try:
                self._check_digest(shard)
                self._read(number)
            except CorruptFile:
                found.append(shard.file)
        return found

    def without(self, files: Collection[str]) -> PromptSet:
        """The same set as if it had never had these shards. Raises: UserError if nothing is left."""
        kept = [(shard, count) for shard, count in zip(self._shards, self.counts, strict=True) if shard.file not in files]
        if not kept:
            raise UserError(f"every shard of prompt set {self.name!r} in {self.directory} is damaged; {self._advice}")
        rest = copy.copy(self)
        rest._shards, rest.counts = [shard for shard, _ in kept], [count for _, count in kept]
        rest._cache = OrderedDict()
        return rest

    def _read(self, number: int) -> list[Prompt]:
        shard = self._shards[number]
        place = self.directory.place(shard.file)
        try:
            with self.directory.file(shard) as path:
                prompts = _decode_shard(path, shard.count)
        except UserError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"prompt shard {place} cannot be read ({error.strerror}); {self._advice}") from error
        except UNREADABLE as error:
            raise CorruptFile(f"prompt shard {place} cannot be read ({type(error).__name__}: {error}); {self._advice}") from error
        if len(prompts) != shard.count:
            raise CorruptFile(f"prompt shard {place} holds {len(prompts)} prompts, {INDEX} says {shard.count}; {self._advice}")
        return prompts[: self.counts[number]]

    def shard(self, number: int) -> list[Prompt]:
        """The prompts of one shard in stored order. The last two shards stay decoded: an epoch may straddle two."""
        if number in self._cache:
            self._cache.move_to_end(number)
        else:
            self._cache[number] = self._read(number)
            if len(self._cache) > 2:
                self._cache.popitem(last=False)
        return self._cache[number]

    def draw(self, n: int, seed: int) -> list[Prompt]:
        """n different prompts, a function of (n, seed) alone; for a larger n with the same seed, the same ones first.

        Raises: UserError if the set holds fewer.
        """
        if not 1 <= n <= len(self):
            raise UserError(f"{n} prompts are to be drawn from set {self.name!r}; expected 1 to {len(self)}, all it has")
        chosen = _permutation(len(self), seed)[:n]
        starts = np.cumsum([0, *self.counts])
        numbers = np.searchsorted(starts, chosen, side="right") - 1
        drawn: dict[int, Prompt] = {}
        for number in np.unique(numbers):  # shard by shard, each read once
            prompts = self.shard(int(number))
            drawn.update((int(position), prompts[position - starts[number]]) for position in chosen[numbers == number])
        return [drawn[int(position)] for position in chosen]


class PromptStream:
    """The shuffled sequence of a prompt set, cut into epochs. It keeps no position: `epoch(e)` may be asked in any order."""

    def __init__(
        self,
        prompt_set: PromptSet,
        *,
        seed: int,
        prompts_per_epoch: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        """
        Args:
            prompt_set: what to go through, over and over.
            seed: from 0; the global sequence depends on nothing else.
            prompts_per_epoch: over all ranks; a multiple of `world_size`, at most `len(prompt_set)`.
            rank, world_size: which part of every epoch is this process's.
            shuffle: False goes through the set in stored order.
        Raises: UserError if the numbers do not fit together.
        """
        if prompts_per_epoch < 1 or prompts_per_epoch % world_size:
            raise UserError(
                f"prompts per epoch is {prompts_per_epoch}; expected a positive multiple of the {world_size} ranks, "
                f"e.g. {max(1, round(prompts_per_epoch / world_size)) * world_size}"
            )
        if prompts_per_epoch > len(prompt_set):
            raise UserError(
                f"prompts per epoch is {prompts_per_epoch}, but set {prompt_set.name!r} in {prompt_set.directory} "
                f"has {len(prompt_set)}; take fewer, or a larger set"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")
        if seed < 0:
            raise UserError(f"prompt seed is {seed}; expected an integer from 0")
        self.prompt_set = prompt_set
        self.seed = seed
        self.prompts_per_epoch = prompts_per_epoch
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle

    def position(self, e: int) -> tuple[int, int]:
        """Where epoch e begins: passes that are finished then, and prompts of the next one that have been drawn."""
        return divmod(e * self.prompts_per_epoch, len(self.prompt_set))

    def epoch(self, e: int) -> list[Prompt]:
        """This rank's prompts_per_epoch / world_size prompts of epoch e, from 0.

        An epoch that straddles two passes over the set can hold a prompt twice; the copy of the later pass has occurrence 1, so
        that its noise is its own.
        """
        if e < 0:
            raise ValueError(f"epoch {e} is negative")
        count = self.prompts_per_epoch // self.world_size
        start = e * self.prompts_per_epoch + self.rank * count
        total = len(self.prompt_set)
        boundary = (e * self.prompts_per_epoch // total + 1) * total  # the position at which the epoch enters its second pass
        return [
            replace(prompt, occurrence=1) if position >= boundary else prompt
            for position, prompt in zip(range(start, start + count), self._from(start))
        ]

    def _shard_order(self, number_of_pass: int) -> Sequence[int]:
        count = len(self.prompt_set.counts)
        return _permutation(count, self.seed, number_of_pass).tolist() if self.shuffle else range(count)

    def _from(self, position: int) -> Iterator[Prompt]:
        """The global sequence from `position` on, without end."""
        counts = self.prompt_set.counts
        first_pass, skip = divmod(position, len(self.prompt_set))
        for number_of_pass in itertools.count(first_pass):
            shard_order = self._shard_order(number_of_pass)
            for place, number in enumerate(shard_order):
                if skip >= counts[number]:
                    skip -= counts[number]
                    continue
                prompts = self.prompt_set.shard(number)
                is_last = place + 1 == len(shard_order)
                self.prompt_set.fetch_ahead(self._shard_order(number_of_pass + 1)[0] if is_last else shard_order[place + 1])
                if self.shuffle:
                    for inside in _permutation(len(prompts), self.seed, number_of_pass, number)[skip:]:
                        yield prompts[inside]
                else:
                    yield from prompts[skip:]
                skip = 0
