from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_prompt_sources import hpdv2, pickapic

from prdp_fast import cli
from prdp_fast.config.recipe import PromptSettings
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import PromptSet, PromptStream
from prdp_fast.prompts.clean import Limits
from prdp_fast.prompts.curate import curate
from prdp_fast.prompts.sources import Source
from prdp_fast.prompts.verify import verify

ROOT = Path(__file__).parents[2]


def text_source(path: Path, lines: list[str]) -> Source:
    path.write_text("\n".join(lines), encoding="utf-8")
    return Source("txt", (path,))


def sets_of(directory: Path) -> dict[str, list[Prompt]]:
    names = json.loads((directory / "index.json").read_text())["sets"]
    return {name: list(PromptSet.open(directory, name)) for name in names}


def texts(prompts: list[Prompt]) -> set[str]:
    return {prompt.text for prompt in prompts}


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


LINES = [f"a painting of creature {number}" for number in range(300)]


def test_sets_are_those_that_recipes_name(tmp_path: Path) -> None:
    report = curate(text_source(tmp_path / "p.txt", LINES), tmp_path / "out", evaluation=40)
    sets = sets_of(tmp_path / "out")
    recipe = PromptSettings(source=str(tmp_path / "out"))
    assert list(sets) == [recipe.train, recipe.seen, recipe.unseen]
    assert {name: len(prompts) for name, prompts in sets.items()} == {"train": 260, "seen_eval": 40, "unseen_eval": 40}
    assert report["sets"] == {"train": 260, "seen_eval": 40, "unseen_eval": 40}
    assert texts(sets["train"]) | texts(sets["unseen_eval"]) == set(LINES)
    assert texts(sets["train"]).isdisjoint(texts(sets["unseen_eval"]))
    assert sets["seen_eval"] == sets["train"][:40]  # the same prompts by number too, so the same noise
    assert sorted(prompt.index for prompt in sets["train"] + sets["unseen_eval"]) == list(range(300))
    assert {prompt.metadata["split"] for prompt in sets["train"]} == {"train"}
    assert {prompt.metadata["split"] for prompt in sets["unseen_eval"]} == {"unseen"}
    # Shuffled: the place in the set says nothing about the place in the file.
    numbers = [int(prompt.text.split()[-1]) for prompt in sets["train"]]
    assert abs(sum(numbers[:130]) / 130 - 150) < 25
    assert len(PromptStream(PromptSet.open(tmp_path / "out", "train"), seed=0, prompts_per_epoch=16).epoch(3)) == 16
    assert verify(tmp_path / "out") == []


def test_order_does_not_matter_and_bytes_repeat(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(LINES + LINES[:50], 350)
    for name, lines in (("a", LINES), ("b", LINES), ("c", shuffled)):
        curate(text_source(tmp_path / f"{name}.txt", lines), tmp_path / name, evaluation=40)
    first, again, other = (hashes(tmp_path / name) for name in "abc")
    assert first == again
    assert {name: value for name, value in first.items() if name != "build.json"} == {
        name: value for name, value in other.items() if name != "build.json"
    }
    curate(text_source(tmp_path / "d.txt", LINES), tmp_path / "d", evaluation=40, seed=1)
    held = [texts(sets_of(tmp_path / name)["unseen_eval"]) for name in "ad"]
    assert held[0] != held[1] and len(held[0] & held[1]) < 20


def test_who_is_held_out_does_not_hang_on_the_others_much(tmp_path: Path) -> None:
    """The held-out prompts are the ones with the smallest hashes: of a larger set they are among those plus the new ones."""
    curate(text_source(tmp_path / "a.txt", LINES[:200]), tmp_path / "a", evaluation=40)
    curate(text_source(tmp_path / "b.txt", LINES), tmp_path / "b", evaluation=40)
    assert texts(sets_of(tmp_path / "b")["unseen_eval"]) <= texts(sets_of(tmp_path / "a")["unseen_eval"]) | set(LINES[200:])


def test_the_first_of_equal_prompts_is_kept(tmp_path: Path) -> None:
    lines = ["A  Red\tCat", "a red cat", "a red CAT ", "Ba\u0308r", "BÄR", "a dog"]
    report = curate(text_source(tmp_path / "p.txt", lines), tmp_path / "out", evaluation=0)
    assert texts(sets_of(tmp_path / "out")["train"]) == {"A Red Cat", "Bär", "a dog"}
    assert (report["rows"], report["kept"], report["dropped"]) == (6, 3, {"duplicate": 3})
    assert list(report["sets"]) == ["train"]


def test_what_is_left_out_is_counted_and_shown(tmp_path: Path) -> None:
    bad = ["", "12 34", "\x01\x02 a", "a" * 40, "x" * 9 + "y" * 1000, "https://example.org/abcdef", "# # # a ###"]
    path = tmp_path / "p.txt"
    path.write_bytes("\n".join(LINES + bad * 4).encode() + b"\n\xff\xfe\n")
    report = curate(Source("txt", (path,)), tmp_path / "out")
    assert report["rows"] == 329 and report["kept"] == 300
    assert report["dropped"] == {
        "empty": 4, "no letters": 4, "control": 4, "repetition": 4, "too long": 4, "url": 4, "symbols": 4, "unreadable": 1,
    }  # fmt: skip
    assert report["kept"] + sum(report["dropped"].values()) == report["rows"]
    assert report["examples"]["control"] == [f"p.txt:{number}: \\x01\\x02 a" for number in (303, 310, 317)]
    assert report["examples"]["unreadable"] == ["p.txt:329: not UTF-8"]
    assert json.loads((tmp_path / "out" / "build.json").read_text()) == report
    assert report["sets"]["unseen_eval"] == 30  # a tenth, where no number was asked for
    short = curate(
        text_source(tmp_path / "q.txt", ["a", "a cat", "a large cat"]), tmp_path / "q", limits=Limits(2, 8), evaluation=0
    )
    assert short["dropped"] == {"too short": 1, "too long": 1}


def test_held_out_source(tmp_path: Path) -> None:
    """HPDv2 with its own benchmark: every style is a set, and a benchmark prompt in the training file is not trained on."""
    directory = hpdv2(tmp_path / "HPDv2", pairs=40)
    train = json.loads((directory / "train.json").read_text())
    train[7]["prompt"] = "Photo  PROMPT 1"
    (directory / "train.json").write_text(json.dumps(train))
    source = Source("hpdv2", (directory,))
    report = curate(source, tmp_path / "out", held_out=source._replace(split="benchmark"))
    sets = sets_of(tmp_path / "out")
    assert texts(sets["train"]) == {f"a prompt with number {number}" for number in range(20)}
    assert texts(sets["unseen_photo"]) == {"photo prompt 0", "photo prompt 1", "photo prompt 2"}
    assert {prompt.metadata["part"] for prompt in sets["unseen_concept-art"]} == {"concept-art"}
    styles = [name for name in sets if name.startswith("unseen_") and name != "unseen_eval"]
    assert len(styles) == 4 and len(sets["unseen_eval"]) == 12
    assert texts(sets["unseen_eval"]) == set().union(*(texts(sets[name]) for name in styles))
    assert report["dropped"] == {"duplicate": 19, "held out": 1}
    assert report["unseen"]["rows"] == report["unseen"]["kept"] == 12
    everything = sets["train"] + sets["unseen_eval"]
    assert sorted(prompt.index for prompt in everything) == list(range(32))
    assert verify(tmp_path / "out") == []
    capped = curate(source, tmp_path / "capped", held_out=source._replace(split="benchmark"), evaluation=5)
    assert capped["sets"] == {
        "train": 20, "seen_eval": 5, "unseen_eval": 5,
        **dict.fromkeys(("unseen_anime", "unseen_concept-art", "unseen_paintings", "unseen_photo"), 3),
    }  # fmt: skip


def test_long_in_tokens(tmp_path: Path) -> None:
    lines = [f"a cat{' and a dog' * (n % 5)} number {n}" for n in range(2500)]

    def count(batch: list[str]) -> list[int]:
        assert len(batch) <= 1024
        return [len(text.split()) for text in batch]

    report = curate(
        text_source(tmp_path / "p.txt", lines), tmp_path / "out", max_tokens=10, count_tokens=count, evaluation=0
    )  # fmt: skip
    assert report["dropped"] == {"too long": 1000}
    assert all(len(text.split()) <= 10 for text in texts(sets_of(tmp_path / "out")["train"]))
    assert report["examples"]["too long"][0] == "p.txt:4: 13 tokens: a cat and a dog and a dog and a dog number 3"


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["", " "], {}, r"none of the 2 rows of source 'txt' is a prompt; 2 of them: nothing but white space, e.g. p.txt:1"),
        ([], {}, "source 'txt' has no rows"),
        (["a cat", "a dog"], {"evaluation": 2}, "--eval 2 holds out 2 of 2 prompts"),
        (["a cat"], {}, "leaves none to train on"),
        (["a cat"], {"evaluation": -1}, "--eval is -1"),
        (["a cat"], {"seed": -1}, "seed is -1"),
        (["a cat"], {"limits": Limits(5, 4)}, "lengths of 5 to 4 characters"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path: Path, lines: list[str], options: dict[str, Any], message: str) -> None:
    source = text_source(tmp_path / "p.txt", lines)
    with pytest.raises(UserError, match=message) as caught:
        curate(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_an_output_in_use_is_left_alone(tmp_path: Path) -> None:
    source = text_source(tmp_path / "p.txt", LINES)
    (tmp_path / "empty").mkdir()
    curate(source, tmp_path / "empty")
    before = hashes(tmp_path / "empty")
    with pytest.raises(UserError, match="exists and is not empty"):
        curate(source, tmp_path / "empty")
    with pytest.raises(UserError, match="exists and is not empty"):
        curate(source, tmp_path / "p.txt")
    with pytest.raises(UserError, match="cannot be written"):
        curate(source, tmp_path / "p.txt" / "below")
    assert hashes(tmp_path / "empty") == before


def test_many_shards(tmp_path: Path) -> None:
    curate(text_source(tmp_path / "p.txt", LINES), tmp_path / "out", evaluation=10, shard_size=64)
    files = sorted(path.name for path in (tmp_path / "out").glob("train-*"))
    assert files == [f"train-{number:05d}.tar.gz" for number in range(5)]
    assert len(texts(sets_of(tmp_path / "out")["train"])) == 290


# ------------------------------------------------------------------------------------------------------------ command line
def test_build_info_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = pickapic(tmp_path / "data"), tmp_path / "out"
    arguments = ["shards", "build", "--source", "pickapic", "--input", str(data), "--unseen-split", "test_unique"]
    assert cli.main([*arguments, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4 rows, 2 prompts kept" in printed and "train-00000-of-00002-abc.parquet:3: column caption is no text" in printed
    assert printed.splitlines()[-1] == str(out)
    assert cli.main(["shards", "info", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "set train: 2 prompts in 1 shards" in printed and "    a test caption" in printed
    assert cli.main(["shards", "verify", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: all right\n"
    assert cli.main([*arguments, "--output", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: --output ")


def test_unseen_prompts_from_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("caption\na cat\na dog\na fox\n")
    (tmp_path / "b.csv").write_text("caption\nA Dog\na cow\n")
    files = {name: str(tmp_path / f"{name}.csv") for name in "ab"}
    arguments = ["--source", "csv", "--input", files["a"], "--unseen", files["b"], "--column", "caption"]
    assert cli.main(["shards", "build", *arguments, "--output", str(tmp_path / "out")]) == 0
    sets = sets_of(tmp_path / "out")
    assert texts(sets["train"]) == {"a cat", "a fox"} and texts(sets["unseen_eval"]) == {"A Dog", "a cow"}


def test_tokens_by_the_embedded_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a small red circle at the top left of a large blue square with a white outline on a green background, painted in oil"
    (tmp_path / "p.txt").write_text(f"a small red circle\na large blue square\n{long}\n")
    arguments = ["shards", "build", "--source", "txt", "--input", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out")]
    tiny = str(ROOT / "prdp_fast" / "world" / "tiny")
    assert cli.main([*arguments, "--max-tokens", "20", "--tokenizer", tiny, "--eval", "0"]) == 0
    assert "1 left out: more characters or tokens than asked for" in capsys.readouterr().out
    assert cli.main([*arguments, "--max-tokens", "20"]) == 2
    assert cli.main([*arguments, "--max-tokens", "20", "--tokenizer", str(tmp_path)]) == 2
    assert "--tokenizer" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ memory
MEASURE = """
import random, re, sys
from pathlib import Path
from prdp_fast.prompts.curate import curate
from prdp_fast.prompts.sources import Row, Source

WORDS = "red old cat on the a hill under moon with blue hat sleepy dog and".split()
SENTENCES = [" ".join(random.Random(n).choices(WORDS, k=9)) for n in range(997)]

class Made(Source):
    def rows(self):
        count = int(self.kind)
        numbers = (number % (count * 9 // 10) for number in range(count))
        return (Row(f"{SENTENCES[number % 997]} {number}", "made", number) for number in numbers)

for count in (2_000, 20_000, 200_000):  # the first fills what fills once
    report = curate(Made(str(count)), Path(sys.argv[1]) / str(count), shard_size=2000, evaluation=100)
    # Not ru_maxrss, which a child takes over from its parent.
    print(report["kept"], 1024 * int(re.search("VmHWM: *(.*) kB", Path("/proc/self/status").read_text().replace("\\t", " "))[1]))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """The peak of the process at ten times the rows is within 6 MB of what it was. Remembering a 16-byte hash of each row alone
    would take 18 MB."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True)
    kept, peaks = zip(*(map(int, line.split()) for line in done.stdout.splitlines()))
    assert kept == (1_800, 18_000, 180_000)
    assert peaks[2] - peaks[1] < 6_000_000, peaks
