from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import PromptSet, PromptStream, ensure_scene_shards, stream, write_index, write_shards


def _stream(directory: Path, **settings: int) -> PromptStream:
    settings = {"seed": 0, "prompts_per_epoch": 8, **settings}
    return PromptStream(PromptSet.open(directory, "train"), **settings)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- order
def test_what_was_written_is_read(small_directory: Path, small_prompts: list[Prompt]) -> None:
    prompt_set = PromptSet.open(small_directory, "train")
    assert len(prompt_set) == 23
    assert list(prompt_set) == small_prompts
    prompt_set.verify()


def test_each_pass_visits_every_prompt_once(small_directory: Path, small_prompts: list[Prompt]) -> None:
    epochs = _stream(small_directory)
    sequence = [prompt.index for e in range(23) for prompt in epochs.epoch(e)]  # 8 passes; epochs straddle shards and passes
    passes = [tuple(sequence[start : start + 23]) for start in range(0, len(sequence), 23)]
    assert all(sorted(one) == [prompt.index for prompt in small_prompts] for one in passes)
    assert len(set(passes)) == 8  # each in an order of its own


def test_world_size_does_not_change_the_global_batches(small_directory: Path) -> None:
    whole = [_stream(small_directory).epoch(e) for e in range(7)]
    for world_size in (2, 4):
        ranks = [_stream(small_directory, rank=rank, world_size=world_size) for rank in range(world_size)]
        for e in range(7):
            parts = [one.epoch(e) for one in ranks]
            assert {len(part) for part in parts} == {8 // world_size}
            assert list(chain(*parts)) == whole[e]


def test_epoch_size_does_not_change_the_sequence(small_directory: Path) -> None:
    by_four, by_twenty = _stream(small_directory, prompts_per_epoch=4), _stream(small_directory, prompts_per_epoch=20)
    four = [prompt.index for e in range(20) for prompt in by_four.epoch(e)]
    twenty = [prompt.index for e in range(4) for prompt in by_twenty.epoch(e)]
    assert four == twenty


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_prompt_twice_in_an_epoch_has_two_occurrences(small_directory: Path, world_size: int) -> None:
    """Noise is keyed by prompt and occurrence: equal keys would make the two groups the same images."""
    repeated = 0
    for e in range(12):
        parts = [_stream(small_directory, prompts_per_epoch=20, rank=rank, world_size=world_size) for rank in range(world_size)]
        keys = [(prompt.index, prompt.occurrence) for part in parts for prompt in part.epoch(e)]
        assert len(set(keys)) == len(keys)
        repeated += len(keys) - len({index for index, _ in keys})
    assert repeated, "no epoch straddled two passes with a repeated prompt: this test saw nothing"


def test_resume_is_a_seek(small_directory: Path) -> None:
    sequential = _stream(small_directory)
    epochs = [sequential.epoch(e) for e in range(30)]
    for e in (29, 3, 17, 0):
        assert _stream(small_directory).epoch(e) == epochs[e]


def test_seeking_reads_only_the_shards_it_needs(small_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    decode = stream._decode_shard
    monkeypatch.setattr(stream, "_decode_shard", lambda path, count: read.append(path.name) or decode(path, count))  # type: ignore[func-returns-value]
    epochs = _stream(small_directory, prompts_per_epoch=1)
    epochs.epoch(1_000_000)
    assert len(read) == 1
    for e in range(23):
        epochs.epoch(e)
    assert len(read) <= 5 and len(epochs.prompt_set._cache) <= 2


def test_seeds_and_epochs_differ(small_directory: Path) -> None:
    orders = {
        tuple(prompt.index for prompt in _stream(small_directory, seed=seed).epoch(e)) for seed in range(4) for e in range(4)
    }
    assert len(orders) == 16


def test_sequence_stays_what_it_was(small_directory: Path) -> None:
    """A run that is resumed with other library versions must see the same prompts."""
    assert [prompt.index - 100 for prompt in _stream(small_directory, seed=1).epoch(0)] == [13, 7, 12, 10, 8, 9, 11, 22]


def test_without_shuffling_the_stored_order_repeats(small_directory: Path) -> None:
    plain = PromptStream(PromptSet.open(small_directory, "train"), seed=0, prompts_per_epoch=20, shuffle=False)
    assert [prompt.index - 100 for e in range(3) for prompt in plain.epoch(e)] == [*range(23), *range(23), *range(14)]


def test_limit_keeps_the_first(small_directory: Path, small_prompts: list[Prompt]) -> None:
    prompt_set = PromptSet.open(small_directory, "train", limit=9)
    assert list(prompt_set) == small_prompts[:9]
    epochs = PromptStream(prompt_set, seed=0, prompts_per_epoch=9)
    assert Counter(prompt.index for e in range(3) for prompt in epochs.epoch(e)) == {100 + number: 3 for number in range(9)}
    assert len(PromptSet.open(small_directory, "train", limit=1000)) == 23


def test_draw(small_directory: Path) -> None:
    prompt_set = PromptSet.open(small_directory, "train")
    drawn = prompt_set.draw(10, seed=5)
    assert drawn == PromptSet.open(small_directory, "train").draw(10, seed=5) == prompt_set.draw(23, seed=5)[:10]
    assert len({prompt.index for prompt in drawn}) == 10 and drawn != prompt_set.draw(10, seed=6)
    assert Counter(prompt.index for prompt in prompt_set.draw(23, seed=5)) == {100 + number: 1 for number in range(23)}
    for n in (0, 24):
        with pytest.raises(UserError, match="1 to 23"):
            prompt_set.draw(n, seed=5)


def test_large_set(scene_directory: Path) -> None:
    epochs = _stream(scene_directory, prompts_per_epoch=512)
    later = epochs.epoch(10_000)  # pass 38
    assert len({prompt.index for prompt in later}) == 512
    ranks = [PromptStream(epochs.prompt_set, seed=0, prompts_per_epoch=512, rank=rank, world_size=2) for rank in range(2)]
    assert list(chain(*(one.epoch(10_000) for one in ranks))) == later


def test_scenes_come_from_the_cache(scene_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRDP_CACHE", str(tmp_path))
    monkeypatch.setattr("prdp_fast.prompts.shards.build_scene_shards", lambda target: target.symlink_to(scene_directory))
    assert len(PromptSet.open("scenes", "unseen_eval")) == 2048
    assert ensure_scene_shards().parent.parent == tmp_path / "prompts"


# --------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts_per_epoch": 9, "world_size": 2}, "multiple of the 2 ranks"),
        ({"prompts_per_epoch": 0}, "positive multiple"),
        ({"prompts_per_epoch": 24}, "has 23; take fewer"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_numbers_that_do_not_fit(small_directory: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _stream(small_directory, **settings)


@pytest.mark.parametrize(
    "source",
    ["pipe:touch pwned", "pipe://touch pwned", "file:prompts.txt", "file:///tmp", "local:///tmp", "hf://x/y.txt", "reference://x",
     "zip://index.json::https://x/y.zip", "simplecache::https://x/y", "https://x/y::file:///tmp", "ftp://x/y", "memory://x/y",
     "s3:bucket/x"],
)  # fmt: skip
def test_urls_of_other_kinds_are_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is a URL of a kind that is not read; expected https://.*on this machine"):
        PromptSet.open(source, "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("absent", "train", "'absent' does not exist"),
        ("absent.txt", "train", "absent.txt cannot be read"),
        (".", "train", "index.json cannot be read"),
        ("small", "trian", "'trian' is not in 'small'; it has 'train', 'nothing'; did you mean 'train'"),
        ("small", "nothing", "'nothing' in .*index.json is empty"),
        ("small/index.json", "train", "neither a directory nor a .txt file"),
    ],
)
def test_sources_that_are_no_prompt_set(
    small_directory: Path, source: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_directory.parent)
    with pytest.raises(UserError, match=message) as caught:
        PromptSet.open(source, name)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_shards_are_found_at_open(small_directory: Path) -> None:
    shard = small_directory / "train-00002.tar.gz"
    shard.write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00002.tar.gz is empty; rebuild"):
        PromptSet.open(small_directory, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00002.tar.gz is missing.*rebuild"):
        PromptSet.open(small_directory, "train")


def _tar_of(path: Path, members: dict[str, bytes]) -> None:
    loose = path.parent / "loose"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            loose.write_bytes(data)
            archive.add(loose, arcname=name)


class _Trap:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (pytest.fail, ("a pickle was loaded",))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def _cut_tar(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[: 3 * 1024]))


DAMAGE = {
    "truncated gzip": _truncate,
    "flipped bit": _flip,
    "no archive": lambda path: path.write_bytes(b"no archive at all" * 100),
    "members lost": _cut_tar,
    "no JSON": lambda path: _tar_of(path, {"1.json": b"{"}),
    "JSON of another kind": lambda path: _tar_of(path, {"1.json": b"[1]"}),
    "a bare word": lambda path: _tar_of(path, {"1.json": b'"text"'}),
    "a picture without JSON": lambda path: _tar_of(path, {"1.png": b"png"}),
    "no text": lambda path: _tar_of(path, {"1.json": b'{"index": 1}'}),
    "empty text": lambda path: _tar_of(path, {"1.json": b'{"index": 1, "text": ""}'}),
    "no number": lambda path: _tar_of(path, {"1.json": b'{"index": "1", "text": "a"}'}),
    "a pickle": lambda path: _tar_of(path, {"1.json": b'{"index": 1, "text": "a"}', "1.pyd": pickle.dumps(_Trap())}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("large", [False, True])
def test_damaged_shards_are_named(small_directory: Path, damage: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    DAMAGE[damage](small_directory / "train-00001.tar.gz")
    if not large:  # found before any work starts
        with pytest.raises(UserError, match=r"train-00001.tar.gz is damaged.*rebuild"):
            PromptSet.open(small_directory, "train")
        return
    monkeypatch.setattr(stream, "CHECKED_AT_OPEN", 0)
    prompt_set = PromptSet.open(small_directory, "train")
    with pytest.raises(UserError, match=r"train-00001.tar.gz is damaged"):
        prompt_set.verify()
    with pytest.raises(UserError, match=r"train-00001.tar.gz (cannot be read|holds).*rebuild") as caught:
        list(prompt_set)
    assert "\n" not in str(caught.value)


def test_members_that_are_not_json_stay_closed(tmp_path: Path) -> None:
    entry = write_shards([Prompt(1, "a", {})], tmp_path, "train")
    path = tmp_path / entry.shards[0].file
    _tar_of(path, {"1.json": b'{"index": 1, "text": "a"}', "1.pyd": pickle.dumps(_Trap()), "1.pickle": pickle.dumps(_Trap())})
    entry.shards[0].bytes, entry.shards[0].sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    write_index(tmp_path, {"train": entry}, "test")
    assert list(PromptSet.open(tmp_path, "train")) == [Prompt(1, "a", {})]
    assert json.loads((tmp_path / "index.json").read_text())["sets"]["train"]["total"] == 1


def test_a_fingerprint_is_of_the_prompts_that_are_used(tmp_path):
    def build(name: str, texts: list[str]) -> Path:
        directory = tmp_path / name
        entry = write_shards([Prompt(i, text, {}) for i, text in enumerate(texts)], directory, "train", shard_size=2)
        write_index(directory, {"train": entry}, "1-test")
        return directory

    one, same, other = build("a", ["x", "y", "z"]), build("b", ["x", "y", "z"]), build("c", ["x", "y", "w"])
    fingerprints = [PromptSet.open(directory, "train").fingerprint for directory in (one, same, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert PromptSet.open(one, "train", limit=2).fingerprint == PromptSet.open(other, "train", limit=2).fingerprint
    assert PromptSet.open(one, "train", limit=1).fingerprint != PromptSet.open(one, "train", limit=2).fingerprint
