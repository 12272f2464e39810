from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import re
import tarfile
from pathlib import Path

import pytest

from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import PromptSet, build_text_shards, ensure_text_shards, write_shards
from prdp_fast.prompts import shards as build
from prdp_fast.prompts.shards import read_index
from prdp_fast.world import scenes


def _hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def _read_all(directory: Path, name: str) -> list[Prompt]:
    """The prompts of a set, found in the bytes: a second reader, and a faster one."""
    prompts = []
    for path in sorted(directory.glob(f"{name}-*.tar.gz")):
        for found in re.findall(rb'{"text".*?}', gzip.decompress(path.read_bytes())):
            record = json.loads(found)
            prompts.append(Prompt(record.pop("index"), record.pop("text"), record))
    return prompts


def test_scene_sets_and_splits(scene_directory: Path) -> None:
    sets = {name: _read_all(scene_directory, name) for name in ("train", "seen_eval", "unseen_eval")}
    texts = {name: {prompt.text for prompt in prompts} for name, prompts in sets.items()}
    assert sets["unseen_eval"] == list(PromptSet.open(scene_directory, "unseen_eval"))
    assert len(sets["train"]) == len(texts["train"]) > 100_000
    assert len(texts["seen_eval"]) == len(texts["unseen_eval"]) == 2048
    assert texts["seen_eval"] <= texts["train"]
    assert texts["unseen_eval"].isdisjoint(texts["train"])
    for binding in scenes.HELD_OUT_BINDINGS:
        assert not any(" ".join(binding) + " with" in text for text in texts["train"])
    for name, prompts in sets.items():
        for prompt in prompts[:: max(1, len(prompts) // 500)]:
            scene = scenes.scene_at(prompt.index)
            assert scene.prompt() == prompt.text
            assert scenes.split_of(scene) == prompt.metadata["split"]
            assert (prompt.metadata["split"] == "train") == (name != "unseen_eval")
    by_split = [prompt.metadata["split"] for prompt in sets["unseen_eval"]]
    assert by_split.count("unseen_combination") == by_split.count("unseen_binding") == 1024
    # Shuffled: a prefix holds about its share of everything, as an enumeration would not.
    prefix = [scenes.parse(prompt.text).size for prompt in sets["train"][:3000]]
    assert all(900 < prefix.count(size) < 1100 for size in scenes.SIZES)


def test_scene_index_tells_the_truth(scene_directory: Path) -> None:
    index = json.loads((scene_directory / "index.json").read_text())
    assert index["version"] == build.scenes_version()
    hashes = _hashes(scene_directory)
    for entry in index["sets"].values():
        assert entry["total"] == sum(shard["count"] for shard in entry["shards"])
        for shard in entry["shards"]:
            assert hashes[shard["file"]] == shard["sha256"]
            assert (scene_directory / shard["file"]).stat().st_size == shard["bytes"]
    assert sum(path.stat().st_size for path in scene_directory.iterdir()) < 8_000_000


def test_version_follows_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.scenes_version()
    monkeypatch.setattr(scenes, "HELD_OUT_COMBINATIONS", 0.5)
    assert build.scenes_version() != before


def test_bytes_are_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_prompts: list[Prompt]) -> None:
    for name, time in (("a", 1e9), ("b", 2e9)):
        monkeypatch.setattr("time.time", lambda now=time: now)
        write_shards(iter(small_prompts), tmp_path / name, "train", shard_size=10)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")
    # Known bytes inside: nothing of the machine, the user or the day is in them. (Gzip's own depend on the zlib.)
    with tarfile.open(tmp_path / "a" / "train-00000.tar.gz") as archive:
        members = archive.getmembers()
        assert len(members) == 10
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        stream = archive.extractfile(members[0])
        assert stream is not None
        assert json.loads(stream.read()) == {"text": "ein Bär, Nummer 0", "index": 100, "style": "anime"}


@pytest.mark.parametrize(("name", "size"), [("00000000.json", 0), ("00012345.json", 103), ("123456789012.json", 8**11 - 1)])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert build._header(name.encode(), size) == member.tobuf(tarfile.USTAR_FORMAT)


def test_scene_shards_are_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "NUM_SCENES", 4000)  # all of it is built once, in the fixture
    for name in ("a", "b"):
        build.build_scene_shards(tmp_path / name)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([Prompt(3, " ", {})], "prompt 3 of set 'train' is empty"),
        ([Prompt(3, "a", {}), Prompt(3, "b", {})], "index 3 occurs twice"),
        ([Prompt(3, "a", {"text": "b"})], "metadata"),
    ],
)
def test_unusable_prompts_are_refused(tmp_path: Path, prompts: list[Prompt], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_shards(prompts, tmp_path, "train")


def test_text_file(tmp_path: Path) -> None:
    file = tmp_path / "animals.txt"
    file.write_text("\ufeffa cat\r\n\r\na Bär\na cat\n", encoding="utf-8")
    build_text_shards(file, tmp_path / "shards")
    prompts = sorted(PromptSet.open(tmp_path / "shards", "train"), key=lambda prompt: prompt.index)
    assert prompts == [Prompt(0, "a cat", {}), Prompt(2, "a Bär", {}), Prompt(3, "a cat", {})]


def test_text_file_is_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRDP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "animals.txt"
    file.write_text("a cat\n")
    assert [prompt.text for prompt in PromptSet.open(str(file), "train")] == ["a cat"]
    file.write_text("a dog\n")
    assert [prompt.text for prompt in PromptSet.open(str(file), "train")] == ["a dog"]
    assert len(list((tmp_path / "cache" / "prompts").iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompts"), (b"\n \n", "holds no prompts"), (b"a cat\na \xff\n", "not UTF-8 in line 2")],
)
def test_unusable_text_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "animals.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"animals.txt.*{message}"):
        ensure_text_shards(file, tmp_path / "cache")
    assert list((tmp_path / "cache" / "prompts").iterdir()) == []  # nothing half-built stays behind


def test_complete_cache_is_reused_and_a_damaged_one_rebuilt(tmp_path: Path) -> None:
    file = tmp_path / "animals.txt"
    file.write_text("a cat\na dog\n")
    index = ensure_text_shards(file, tmp_path / "cache")
    shard = index.parent / "train-00000.tar.gz"
    before = shard.stat().st_mtime_ns
    assert ensure_text_shards(file, tmp_path / "cache") == index
    assert shard.stat().st_mtime_ns == before
    shard.unlink()
    assert ensure_text_shards(file, tmp_path / "cache") == index
    assert len(list(PromptSet.open(index.parent, "train"))) == 2
    assert [path.name for path in index.parent.parent.iterdir()] == [index.parent.name]


def _race(file: Path, cache: Path, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    index = ensure_text_shards(file, cache)
    results.put(len(list(PromptSet.open(index.parent, "train"))))  # type: ignore[attr-defined]


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_may_race_for_the_cache(tmp_path: Path, damaged: bool) -> None:
    file = tmp_path / "many.txt"
    file.write_text("".join(f"prompt {number}\n" for number in range(2000)))
    if damaged:
        (ensure_text_shards(file, tmp_path).parent / "index.json").unlink()
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_race, args=(file, tmp_path, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=20) for _ in processes] == [2000] * 3
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list((tmp_path / "prompts").iterdir())) == 1


def test_unwritable_cache(tmp_path: Path) -> None:
    file = tmp_path / "animals.txt"
    file.write_text("a cat\n")
    with pytest.raises(UserError, match=r"animals.txt.*set PRDP_CACHE"):
        ensure_text_shards(file, file)  # a file cannot be a directory, even for root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(sets=3), "sets"),
        (lambda index: index["sets"]["train"].update(total=24), "total is 24, but the shards hold 23"),
        (lambda index: index["sets"]["train"]["shards"][0].update(file="../train-00000.tar.gz"), "shards.0.file"),
        (lambda index: index["sets"]["train"]["shards"][0].update(file="pipe:touch x"), "shards.0.file"),
    ],
)
def test_damaged_index(small_directory: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = small_directory / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"index.json is damaged.*{message}") as caught:
        read_index(path)
    assert "\n" not in str(caught.value)
