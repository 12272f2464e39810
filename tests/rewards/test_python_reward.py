"""A user's own function as a reward: found, called, and its faults told in one line."""

from __future__ import annotations

import io
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import numpy as np
import pytest
import torch
from launching import ROOT, TRAIN

from prdp_fast.config.recipe import RewardSettings
from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.rewards import RewardOutput, WeightedRewards, build_rewards
from prdp_fast.rewards.registry import build_reward

IMAGES = torch.stack([torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (10, 20, 30)])
METADATA = [{"bonus": value} for value in (1.0, 2.0, 3.0)]


def reward(source: str, directory: Path, name: str = "score", **arguments):
    (directory / "mine.py").write_text(source)
    return build_reward("python", {"function": f"{directory / 'mine.py'}:{name}", "arguments": arguments})


def test_two_arguments_three_arguments_and_named_ones(tmp_path):
    two = reward("def score(images, prompts):\n    return images.float().mean((1, 2, 3))", tmp_path)
    assert torch.equal(torch.as_tensor(two.score(IMAGES, ["a"] * 3, METADATA).scores), torch.tensor([10.0, 20.0, 30.0]))
    three = reward(
        "def score(images, prompts, metadata):\n    return [m['bonus'] + len(p) for m, p in zip(metadata, prompts)]", tmp_path
    )
    assert three.score(IMAGES, ["", "x", "xx"], METADATA).scores == [1.0, 3.0, 5.0]
    named = reward("def score(images, prompts, *, scale):\n    return [scale] * len(images)", tmp_path, scale=2.5)
    assert named.score(IMAGES, ["a"] * 3, METADATA).scores == [2.5] * 3


@pytest.mark.parametrize(
    ("signature", "arguments", "gets"),
    [
        ("images, prompts, scale=2.0", {}, False),
        ("images, prompts, scale=2.0, metadata=None", {}, True),
        ("images, prompts, metadata=None", {}, True),
        ("images, prompts, *, metadata", {}, True),
        ("images, prompts, *, metadata=None", {}, True),
        ("images, prompts, whatever", {}, True),
        ("images, prompts, scale", {"scale": 3}, False),
        ("images, prompts, scale, metadata", {"scale": 3}, True),
        ("images, prompts, metadata", {"metadata": "mine"}, False),
        ("images, prompts, *rest", {}, True),
        ("*everything", {}, True),
        ("images, prompts, **options", {}, False),
    ],
)
def test_what_is_given_as_metadata(tmp_path, signature, arguments, gets):
    """A third parameter with a default is the function's own option, unless it is called metadata."""
    found = reward(
        f"seen = []\ndef score({signature}):\n    seen.append(dict(locals()))\n    return [1.0, 2.0, 3.0]", tmp_path, **arguments
    )
    assert found.score(IMAGES, ["a"] * 3, METADATA).scores == [1.0, 2.0, 3.0]
    (seen,) = found.function.__globals__["seen"]
    assert (str(METADATA) in str(list(seen.values()))) == gets
    assert seen.get("scale", 2.0) in (2.0, 3)


def test_details_and_unscored_images_go_through(tmp_path):
    source = (
        "import torch\nfrom prdp_fast.rewards import RewardOutput\n"
        "def score(images, prompts):\n    return RewardOutput([1.0, float('nan'), 2.0], {'half': torch.ones(3) / 2})"
    )
    (tmp_path / "mine.py").write_text(source)
    settings = RewardSettings(name="python", weight=3.0, options={"function": f"{tmp_path / 'mine.py'}:score"})
    scores = build_rewards([settings]).score(IMAGES, ["a"] * 3, METADATA)
    assert scores.total[[0, 2]].tolist() == [3.0, 6.0] and math.isnan(scores.total[1])
    assert scores.details["python/half"].tolist() == [0.5] * 3


def test_a_module_on_the_path_and_a_relative_file(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def score(images, prompts):\n    return [7.0] * len(images)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for function in ("own_rewards:score", "own_rewards.py:score"):
        assert build_reward("python", {"function": function}).score(IMAGES, ["a"] * 3, METADATA) == RewardOutput([7.0] * 3)


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("def other(images, prompts): ...", "score", "has no function 'score'; it has other"),
        ("score = 3", "score", "has no function 'score'; it has none"),
        (
            "import no_such_library",
            "score",
            "could not be imported: ModuleNotFoundError: No module named 'no_such_library' (mine.py:1)",
        ),
        ("x = 1\ny = 1 / 0", "score", "could not be imported: ZeroDivisionError: division by zero (mine.py:2)"),
        ("def score(images: (", "score", "could not be imported: SyntaxError"),
        ("import sys\nsys.exit(0)", "score", "could not be imported: SystemExit: 0 (mine.py:2)"),
        ("open('no such file')", "score", "could not be imported: FileNotFoundError: [Errno 2] No such file"),
        ("async def score(images, prompts): ...", "score", "is an async function; expected a plain one"),
        ("def score(images): ...", "score", "signature (images); expected to call it as (images, prompts) or"),
        ("def score(images, prompts): ...", "not a name", "expected 'path/to/file.py:function' or 'package.module:function'"),
    ],
)
def test_faults_before_any_work(tmp_path, source, name, words):
    with pytest.raises(UserError) as caught:
        reward(source, tmp_path, name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("function", ["nowhere.py:score", "no_such_module:score", "no colon"])
def test_nothing_there(function):
    with pytest.raises(UserError, match=r"reward 'python': .*(no file|could not be imported|expected)"):
        build_reward("python", {"function": function})


def test_a_fault_while_scoring_stops_the_run_and_names_the_line(tmp_path):
    broken = reward("def score(images, prompts):\n    scores = {}\n    return scores['x']", tmp_path)
    with pytest.raises(RewardError, match=r"mine\.py:score raised KeyError: 'x' \(mine\.py:3\)"):
        broken.score(IMAGES, ["a"] * 3, METADATA)


# Functions that do more than return


def run_of(found, count: int = 1):
    for _ in range(count):
        output = build(found).score(IMAGES, ["a"] * 3, METADATA)
    return output


def build(found) -> WeightedRewards:
    return WeightedRewards([found], [1.0])


CHANGES = {
    "gradients": "torch.set_grad_enabled(False)",
    "inference": "held.append(torch.inference_mode()); held[-1].__enter__()",
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta')",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "benchmark": "torch.backends.cudnn.benchmark = True",
    "autocast": "held.append(torch.autocast('cpu', torch.bfloat16)); held[-1].__enter__()",
    "directory": "os.chdir('/')",
    "seeds": "torch.manual_seed(1); np.random.seed(2); random.seed(3)",
}


def state() -> list[object]:
    return [
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_default_device(),
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark, torch.is_autocast_enabled("cpu"), os.getcwd(), torch.get_rng_state().tolist(),
        str(np.random.get_state()), random.getstate(), sys.path[:],  # noqa: NPY002
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["call", "import"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_function_changes_is_put_back(tmp_path, change, where, caplog):
    code = CHANGES[change]
    source = "import os, random\nimport numpy as np\nimport torch\nheld = []\n"
    source += f"{code}\n" if where == "import" else ""
    source += f"def score(images, prompts):\n    {code if where == 'call' else 'pass'}\n    return [1.0, 2.0, 3.0]\n"
    before = state()
    with caplog.at_level(logging.WARNING):
        found = reward(source, tmp_path)
        assert state() == before
        for _ in range(2):  # here, as in the server; and in the thread that jobs have
            assert found.score(IMAGES, ["a"] * 3, METADATA).scores == [1.0, 2.0, 3.0]
            assert state() == before
            assert run_of(found).total.tolist() == [1.0, 2.0, 3.0]
            assert state() == before
    told = [record.getMessage() for record in caplog.records]
    if change == "seeds":
        assert told == []  # nothing of the job's was touched
    else:
        assert len(told) == 1 and "reward 'python'" in told[0] and "mine.py:score left" in told[0]


STREAMS = {
    "closed": "sys.stdout.close(); sys.stderr.close()",
    "closed below": "sys.stdout.buffer.close()",
    "replaced": "sys.stdout = sys.stderr = io.StringIO()",
    "none": "sys.stdout = None; del sys.stderr",
    "wrapped again": "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')",
    "taken away": "sys.stdout = codecs.getwriter('utf-8')(sys.stdout.detach())",
    "its errors": "sys.stdout.reconfigure(errors='strict')",
    "descriptors closed": "os.close(1); os.close(2); held.append(open(os.devnull))",
    "descriptors led away": "os.dup2(os.open(os.devnull, os.O_WRONLY), 1); os.dup2(1, 2)",
}


@pytest.mark.parametrize("where", ["call", "import"])
@pytest.mark.parametrize("change", STREAMS)
def test_output_goes_on_after_a_function_that_ends_it(tmp_path, change, where):
    """In a process of its own: pytest has streams of its own."""
    source = "import codecs, io, os, sys\nheld = []\n"
    source += f"{STREAMS[change]}\n" if where == "import" else ""
    source += f"def score(images, prompts):\n    {STREAMS[change] if where == 'call' else 'pass'}\n    return [1.0, 2.0, 3.0]\n"
    (tmp_path / "mine.py").write_text(source)
    program = f"""
import logging, sys, torch
from prdp_fast.rewards.python import PythonReward
logging.basicConfig()
sys.stdout.reconfigure(errors="backslashreplace", encoding="ascii")
found = PythonReward(function={str(tmp_path / "mine.py") + ":score"!r})
for call in range(3):
    assert found.score(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), ["a"] * 3, [{{}}] * 3).scores == [1.0, 2.0, 3.0]
    print("printed \u4e00", call)
    logging.warning("logged %d", call)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [rf"printed \u4e00 {call}" for call in range(3)]
    (told,) = (line for line in done.stderr.splitlines() if not line.startswith("WARNING:root:logged"))
    assert "mine.py:score left" in told and ("sys.std" in told or "file descriptor 1" in told)
    assert done.stderr.count("logged") == 3


def test_a_stream_that_cannot_be_opened_again_names_the_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    found = reward("import sys\ndef score(images, prompts):\n    sys.stdout.close()\n    return [1.0] * 3", tmp_path)
    with pytest.raises(RewardError, match=r"mine\.py:score changed sys\.stdout, which could not be put back \(it is closed"):
        found.score(IMAGES, ["a"] * 3, METADATA)


def test_put_back_after_a_failure_too(tmp_path):
    found = reward("import torch\ndef score(images, prompts):\n    torch.set_default_dtype(torch.float64)\n    1 / 0", tmp_path)
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        found.score(IMAGES, ["a"] * 3, METADATA)
    assert torch.get_default_dtype() == torch.float32


def test_what_cannot_be_put_back_names_the_reward(tmp_path, monkeypatch):
    found = reward(
        "import os\ndef score(images, prompts):\n    os.chdir('/')\n    os.rmdir(here)\n    return [1.0] * 3", tmp_path
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    found.function.__globals__["here"] = str(gone)
    here = os.getcwd()
    os.chdir(gone)
    try:
        with pytest.raises(
            RewardError, match=r"reward 'python': .*mine\.py:score changed the directory, which could not be put back"
        ):
            found.score(IMAGES, ["a"] * 3, METADATA)
    finally:
        os.chdir(here)


def test_a_function_goes_on_with_its_own_random_numbers(tmp_path):
    source = "import random, numpy, torch\n{}def score(images, prompts):\n"
    source += "    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]\n"
    free, seeded = source.format(""), source.format("random.seed(5); numpy.random.seed(5); torch.manual_seed(5)\n")
    calls = []
    for text in (free, seeded, seeded):
        found = reward(text, tmp_path)
        calls.append([found.score(IMAGES, ["a"] * 3, METADATA).scores for _ in range(3)])
    assert calls[1] == calls[2] != calls[0] and len({tuple(call) for call in calls[1]}) == 3
    random.seed(5)
    assert calls[1][0][0] == random.random()


def test_pictures_and_metadata_are_the_functions_own(tmp_path):
    source = "def score(images, prompts, metadata):\n    images.numpy()[:] = 0\n    prompts.clear()\n    metadata[0].clear()\n"
    source += "    metadata[1]['bonus'] = 9\n    return [1.0] * 3"
    images, prompts, metadata = IMAGES.clone(), ["a"] * 3, [dict(entry) for entry in METADATA]
    reward(source, tmp_path).score(images, prompts, metadata)
    assert torch.equal(images, IMAGES) and prompts == ["a"] * 3 and metadata == METADATA


@pytest.mark.parametrize(
    "code",
    ["raise SystemExit('no licence')", "import sys; sys.exit(0)", "raise KeyboardInterrupt", "raise GeneratorExit",
     "class Own(BaseException): ...\n    raise Own('no licence')"],
)  # fmt: skip
def test_a_function_cannot_end_the_process(tmp_path, code):
    found = reward(f"def score(images, prompts):\n    {code}", tmp_path)
    with pytest.raises(RewardError, match=r"reward 'python': .*mine\.py:score raised \w+.*\(mine\.py:[23]\)"):
        run_of(found)


def test_modules_beside_the_file(tmp_path):
    """Imported with the file or in the first call; the path is as it was afterwards."""
    (tmp_path / "beside_one.py").write_text("A = 2.0")
    (tmp_path / "beside_two.py").write_text("B = 3.0")
    source = "from beside_one import A\ndef score(images, prompts):\n    from beside_two import B\n    return [A, B, A * B]"
    path = sys.path[:]
    assert run_of(reward(source, tmp_path)).total.tolist() == [2.0, 3.0, 6.0] and sys.path == path


@pytest.mark.parametrize(
    "returned",
    ["[1.0, 2.0, 3.0], {'own': [1]}", "np.array([1.0, 2.0, 3.0]), [{}, {}, {}]", "(1.0, 2.0, 3.0)",
     "(s for s in (1.0, 2.0, 3.0))", "map(float, (1, 2, 3))", "torch.tensor([[1.0], [2.0], [3.0]]), None"],
)  # fmt: skip
def test_what_other_trainers_rewards_return(tmp_path, returned):
    found = reward(f"import numpy as np, torch\ndef score(images, prompts):\n    return {returned}", tmp_path)
    assert run_of(found).total.tolist() == [1.0, 2.0, 3.0]


def test_a_real_interrupt_ends_a_hanging_call(tmp_path):
    """Ctrl-C while a function hangs that catches everything, in the background and not."""
    (tmp_path / "mine.py").write_text(
        "import time\ndef score(images, prompts):\n    print('hanging', flush=True)\n    while True:\n"
        "        try:\n            time.sleep(60)\n        except BaseException:\n            pass\n"
    )
    script = (
        "import sys, torch\nfrom functools import partial\nfrom prdp_fast.rewards import *\n"
        "rewards = WeightedRewards([build_reward('python', {'function': 'mine.py:score'})], [1.0])\n"
        "call = partial(rewards.score, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ['a'], [{}])\n"
        "scorer = BackgroundScores(sys.argv[1] == 'background')\n"
        "try:\n    scorer.start(call)()\nfinally:\n    scorer.close()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    for where in ("background", "foreground"):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{script}", where],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "hanging\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert time.monotonic() - started < 30 and process.returncode != 0 and "KeyboardInterrupt" in said


def test_the_shipped_example_trains(tmp_path):
    """One epoch of the smoke recipe on examples/custom_reward.py."""
    launching.run(
        TRAIN, "--config", "zero2.json", "--recipe", "smoke", "--output", tmp_path / "run",
        "--set", "rewards=[{name: python, options: {function: examples/custom_reward.py:red}}]",
        "--set", "schedule.epochs=1", "--set", "schedule.updates_per_epoch=1", "--set", "schedule.prompts_per_epoch=2",
        "--set", "evaluation.prompts=0", "--set", "performance.attention=sdpa", "--set", "performance.fuse_qkv=off",
        ranks=1, cwd=ROOT,  # by which the example is found
    )  # fmt: skip
    assert (tmp_path / "run" / "summary.json").is_file()
    assert '"reward/python"' in (tmp_path / "run" / "metrics.jsonl").read_text()
