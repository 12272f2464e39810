from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from prdp_fast import cli
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import verify as check
from prdp_fast.prompts import write_index, write_shards
from prdp_fast.prompts.verify import describe, verify


def prompts(numbers: range, split: str = "train") -> list[Prompt]:
    return [Prompt(number, f"a painting of creature {number}", {"split": split}) for number in numbers]


def directory_of(path: Path, **sets: list[Prompt]) -> Path:
    write_index(path, {name: write_shards(some, path, name, shard_size=20) for name, some in sets.items()}, "test")
    return path


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return directory_of(
        tmp_path / "set", train=prompts(range(50)), seen_eval=prompts(range(10)), unseen_eval=prompts(range(50, 60), "unseen")
    )


def test_a_sound_directory(sound: Path, scene_directory: Path) -> None:
    assert verify(sound) == []
    version, sets = describe(sound)
    assert version == "test" and [(one.name, one.prompts, one.shards) for one in sets] == [
        ("train", 50, 3), ("seen_eval", 10, 1), ("unseen_eval", 10, 1),
    ]  # fmt: skip
    assert sets[2].examples == [f"a painting of creature {number}" for number in (50, 51, 52)]
    assert sum(one.bytes for one in sets) == sum(path.stat().st_size for path in sound.glob("*.tar.gz"))


def rewrite(path: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """The same archive with other members."""
    with tarfile.open(path) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    with tarfile.open(path, "w:gz") as archive:
        for name, data in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def damage(path: Path, kind: str) -> None:
    shard = path / "train-00001.tar.gz"
    if kind == "missing":
        shard.unlink()
    elif kind == "a flipped bit":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(bytes(data))
    elif kind == "a member lost":
        rewrite(shard, lambda members: members[:-1])
    elif kind == "a member renamed":
        rewrite(shard, lambda members: [("99999999.json", members[0][1]), *members[1:]])
    elif kind == "a member that is no prompt":
        rewrite(shard, lambda members: [*members, ("picture.png", b"png")])
    elif kind == "a truncated archive":
        shard.write_bytes(gzip.compress(gzip.decompress(shard.read_bytes())[:-5000]))
    elif kind == "a stray shard":
        (path / "train-00009.tar.gz").write_bytes(shard.read_bytes())
    elif kind == "a damaged index":
        index = json.loads((path / "index.json").read_text())
        index["sets"]["train"]["total"] = 3
        (path / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", ["train-00001.tar.gz: missing (No such file or directory)", "seen"]),
        ("a flipped bit", ["SHA-256 differs", "cannot be read"]),
        ("a member lost", ["SHA-256 differs", "train-00001.tar.gz: 19 prompts, index.json says 20"]),
        ("a member renamed", ["member 99999999.json and 0 more are not named by their index"]),
        ("a member that is no prompt", ["member picture.png is no prompt"]),
        ("a truncated archive", ["SHA-256 differs"]),
        ("a stray shard", ["train-00009.tar.gz: not in index.json"]),
        ("a damaged index", ["total is 3, but the shards hold 50"]),
    ],
)
def test_faults_are_named_line_by_line(sound: Path, kind: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    damage(sound, kind)
    faults = verify(sound)
    for message in expected:
        if message != "seen":
            assert any(message in fault for fault in faults), faults
    assert all("\n" not in fault for fault in faults)
    assert cli.main(["shards", "verify", str(sound)]) == 1
    assert capsys.readouterr().out.splitlines() == faults


def test_every_fault_is_told(sound: Path) -> None:
    damage(sound, "a member lost")
    damage(sound, "a stray shard")
    (sound / "unseen_eval-00000.tar.gz").write_bytes(b"")
    faults = verify(sound)
    assert {fault.split(":")[0] for fault in faults} == {"train-00001.tar.gz", "train-00009.tar.gz", "unseen_eval-00000.tar.gz"}


def test_leaks_between_sets(tmp_path: Path) -> None:
    leaking = [*prompts(range(58, 60), "unseen"), Prompt(60, "A painting  of CREATURE 7", {})]
    faults = verify(directory_of(tmp_path / "leak", train=prompts(range(50)), unseen_eval=leaking, unseen_photo=leaking))
    assert faults == [
        f"set {name}: 1 prompts are in train too, e.g. 'A painting  of CREATURE 7'" for name in ("unseen_eval", "unseen_photo")
    ]
    faults = verify(directory_of(tmp_path / "strange", train=prompts(range(50)), seen_eval=prompts(range(49, 52))))
    assert len(faults) == 1 and faults[0].startswith("set seen_eval: 2 prompts are not in train, e.g. 'a painting of creature 5")


def test_repeats_in_a_set(tmp_path: Path) -> None:
    again = [*prompts(range(50)), Prompt(50, "a painting of Creature 3", {})]
    assert verify(directory_of(tmp_path / "texts", train=again)) == [
        "set train: 1 prompts occur again, e.g. 'a painting of creature 3'"
    ]
    path = directory_of(tmp_path / "indices", train=prompts(range(40)))
    rewrite(
        path / "train-00001.tar.gz", lambda members: [(name, data.replace(b'"index":25', b'"index":5')) for name, data in members]
    )
    assert "set train: 1 indices occur more than once, e.g. 5" in verify(path)


def test_texts_are_compared_over_shards_of_both_sets(tmp_path: Path) -> None:
    """A leak is found wherever the two copies lie."""
    for place in (0, 19, 20, 49):
        unseen = [*prompts(range(100, 145), "unseen"), prompts(range(place, place + 1))[0]]
        faults = verify(directory_of(tmp_path / str(place), train=prompts(range(50)), unseen_eval=unseen))
        assert faults == [f"set unseen_eval: 1 prompts are in train too, e.g. 'a painting of creature {place}'"]


def test_no_prompt_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"is no prompt directory \(index.json is missing\)"):
        verify(tmp_path)
    assert cli.main(["shards", "verify", str(tmp_path)]) == 2
    assert cli.main(["shards", "info", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_info_of_a_damaged_shard_goes_on(sound: Path) -> None:
    (sound / "train-00000.tar.gz").write_bytes(b"no archive")
    _, sets = describe(sound)
    assert "cannot be read" in sets[0].examples[0] and sets[1].examples[0] == "a painting of creature 0"
    assert sets[0].name == check.TRAIN
