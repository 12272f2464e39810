"""docs/security.md: each of its sentences is held by a test, and the tests of those that no other room has."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from prdp_fast import cli
from prdp_fast.config.load import load_recipe
from prdp_fast.core import checkpoint_files, distributed, ranks, stops
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json
from prdp_fast.core.watchdog import watching
from prdp_fast.evaluation.plan import plan_evaluation
from prdp_fast.evaluation.request import EvaluationRequest
from prdp_fast.models.families import read_family
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.planning.job import Job
from prdp_fast.reporting.model_card import write_model_card
from prdp_fast.studies.declaration import Study
from prdp_fast.studies.page import page as study_page
from prdp_fast.world import TINY

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "security.md"
HERE = "tests/test_security.py"
# The sentences outside of tables, as they stand on the page, and the tests that hold each.
HELD: dict[str, tuple[str, ...]] = {
    "What this package reads from others, what it trusts, and what it does not.": (
        f"{HERE}::test_every_sentence_is_held_by_tests",
    ),
    "A line of a table names the tests that hold it; `tests/test_security.py` names those of every other sentence, and fails "
    "where a sentence has none.": (
        f"{HERE}::test_every_sentence_is_held_by_tests", f"{HERE}::test_a_sentence_that_nothing_holds_is_noticed",
    ),
    "The command line, and the recipe and the DeepSpeed file that it names: a recipe of yours may name Python code as a reward, "
    "and that code runs with your rights.": (
        "tests/rewards/test_python_reward.py::test_the_shipped_example_trains",
        f"{HERE}::test_code_of_a_recipe_has_its_user_s_rights",
    ),
    "The models that a recipe names: diffusers and transformers load them, and nothing here passes `trust_remote_code`.": (
        f"{HERE}::test_nothing_passes_trust_remote_code", f"{HERE}::test_code_in_a_model_directory_is_not_run",
    ),
    "Installed packages, and the ranks of the same job, which talk over the network without encryption: keep `MASTER_PORT` on a "
    "network of your own.": (f"{HERE}::test_ranks_talk_without_encryption",),
    "`run.json`, an evaluation's `settings.json` and `evaluation.json`, and the page of a study hold reward options as they "
    "are.": (
        f"{HERE}::test_what_holds_reward_options_as_they_are",
    ),
    "None of them is part of `model/`: look at them before you pass a run directory on.": (
        f"{HERE}::test_an_exported_model_holds_no_reward_options",
    ),
    "Weights that are made to mislead: `run.json` has the digest of a model's files, and nothing looks at what they compute.": (
        "tests/planning/test_job_record.py::test_a_file_of_the_model_that_was_exchanged",
        f"{HERE}::test_other_weights_are_another_digest_and_load_all_the_same",
    ),
    "Somebody who may write into the run directory, or into the prompt directory, while a job runs can stop it.": (
        f"{HERE}::test_a_file_in_the_run_directory_stops_a_job",
        "tests/integration/test_one_rank_faults.py::test_a_shard_that_only_one_rank_needs",
    ),
    "The index of prompts behind a URL is taken as it comes, over http too, and a run that goes on notices another one.": (
        "tests/prompts/test_prompt_urls.py::test_a_job_is_known_by_its_index",
    ),
}  # fmt: skip


# The page.


def sentences(text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Those of prose and lists; and what the lines of tables say, with their last cell."""
    prose, rows, paragraph = [], [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.append((": ".join(cells[:-1]), cells[-1]))
        elif not line or line.startswith(("#", "- ")):
            prose += re.split(r"(?<=[.!?]) (?=[A-Z`])", " ".join(paragraph)) if paragraph else []
            paragraph = [line.removeprefix("- ")] if line.startswith("- ") else []
        else:
            paragraph.append(line.strip())
    heads = [number for number, (_, last) in enumerate(rows) if set(last) == {"-"}]
    return prose, [row for number, row in enumerate(rows) if number not in heads and number + 1 not in heads]


def faults_of(text: str, held: dict[str, tuple[str, ...]]) -> list[str]:
    """What of a page is held by no test that there is."""
    prose, rows = sentences(text)
    found = [f"no test holds: {one}" for one in prose if one not in held]
    found += [f"no longer on the page: {one}" for one in held if one not in prose]
    named = {one: list(tests) for one, tests in held.items()} | {one: re.findall(r"`([^`]+)`", last) for one, last in rows}
    for one, tests in named.items():
        found += [f"no test holds: {one}"] if not tests else []
        found += [f"{test} is no test: {one}" for test in tests if not is_test(test)]
    return found


def is_test(name: str) -> bool:
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file() or not path.startswith("tests/") or not function.startswith("test_"):
        return False
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def test_every_sentence_is_held_by_tests() -> None:
    text = PAGE.read_text(encoding="utf-8")
    prose, rows = sentences(text)
    assert len(prose) > 7 and len(rows) > 25 and all(len(one) > 20 for one, _ in rows)
    assert not faults_of(text, HELD), "\n".join(faults_of(text, HELD))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("## What is not", "Nothing can go wrong. It never has.\n\n## What is not", "no test holds: Nothing can go wrong."),
        ("- Weights that are", "- Everything is safe.\n- Weights that are", "no test holds: Everything is safe."),
        ("| reward servers | an answer is bounded", "| recipes | all is well | |\n| reward servers | an answer is bounded",
         "no test holds: recipes: all is well"),
        ("::test_an_answer_without_end", "::test_an_answer", "test_an_answer is no test"),
        ("can stop it.", "can do no harm.", "no longer on the page: Somebody who may write"),
    ],
)  # fmt: skip
def test_a_sentence_that_nothing_holds_is_noticed(old: str, new: str, fault: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(old) == 1 and any(fault in one for one in faults_of(text.replace(old, new), HELD))


# What is trusted.


def test_code_of_a_recipe_has_its_user_s_rights(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, pathlib\npathlib.Path(__file__).with_name('ran').write_text(str(os.getuid()))\n"
        "def score(images, prompts):\n    return [0.0] * len(prompts)\n"
    )
    options = f"{{function: '{tmp_path / 'mine.py'}:score'}}"
    settings = load_recipe("smoke", [f"rewards=[{{name: python, options: {options}}}]", "prompts.source=animals"])
    Job.prepare(settings, "zero2.json", world_size=1, cuda=False)
    assert (tmp_path / "ran").read_text() == str(os.getuid())


def test_nothing_passes_trust_remote_code() -> None:
    """Nor anything else that would load a pipeline's own code: `custom_pipeline`."""
    files = [*(ROOT / "prdp_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {
        (path.name, word.arg) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) for word in node.keywords
    }  # fmt: skip
    texts = {
        (path.name, node.value) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # fmt: skip
    assert len(files) > 100 and ("engine.py", "weights_only") not in names
    assert not [one for one in names | texts if one[1] in ("trust_remote_code", "custom_pipeline", "custom_revision")]


TRAP = "import pathlib\npathlib.Path({trace!r}).touch()\nclass Own:\n    from_pretrained = save_pretrained = None\n"


@pytest.mark.parametrize("component", ["unet", "scheduler", "tokenizer"])
def test_code_in_a_model_directory_is_not_run(tmp_path: Path, component: str) -> None:
    model, trace = Path(shutil.copytree(TINY, tmp_path / "model")), tmp_path / "trace"
    code = TRAP.format(trace=str(trace))
    for place in (model / "own.py", model / component / "own.py", model / "pipeline.py"):
        place.write_text(code)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {component: ["own", "Own"]}))
    config = next((model / component).glob("*config.json"))
    auto = {"AutoModel": "own.Own", "AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto, "_class_name": "Own"}))
    with pytest.raises(UserError):
        Pipeline.load(str(model), torch.device("cpu"), torch.float32)
    assert not trace.exists()


class Program:
    """What a pickle makes of it when it is read: a call of `touch`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_run_nothing(tmp_path: Path, component: str, zipped: bool) -> None:
    model, trace = Path(shutil.copytree(TINY, tmp_path / "model")), tmp_path / "trace"
    (weights,) = (model / component).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Program(trace)}, model / component / name, _use_new_zipfile_serialization=zipped)
    torch.load(model / component / name, weights_only=False)
    assert trace.exists(), "the trap works"
    trace.unlink()
    with pytest.raises(UserError):
        Pipeline.load(str(model), torch.device("cpu"), torch.float32)
    assert not trace.exists()


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Iterator[bytearray]:
    """MASTER_PORT on the way to a store, and what goes through it."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    seen, listener = bytearray(), socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            seen.extend(data)
            target.sendall(data)

    def serve() -> None:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", store.port))
        for pair in ((client, server), (server, client)):
            threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    variables = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "1", "RANK": "0",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield seen
    listener.close()


def test_ranks_talk_without_encryption(relay: bytearray) -> None:
    store = distributed.after_restart(timedelta(seconds=30))["store"]
    store.set("where rank 0 listens", "10.0.0.7 port 4711")
    assert store.get("where rank 0 listens") == b"10.0.0.7 port 4711"
    assert b"10.0.0.7 port 4711" in relay


# What is not.


def test_looking_at_a_run_runs_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's: its reward is code, and every file that torch reads holds a program, with a manifest that is right."""
    monkeypatch.chdir(tmp_path)
    run, trace = tmp_path / "run", tmp_path / "trace"
    (tmp_path / "theirs.py").write_text(TRAP.format(trace=str(trace)) + "def score(images, prompts):\n    return [0.0]\n")
    recipe = load_recipe("smoke", ["rewards=[{name: python, options: {function: 'theirs.py:score'}}]"]).model_dump(mode="json")
    checkpoint = run / "checkpoints/epoch-000001"
    (checkpoint / "zero").mkdir(parents=True)
    write_json(run / "run.json", {"recipe": recipe, "deepspeed": {}, "world_size": 1})
    (run / "metrics.jsonl").write_text('{"epoch": 0, "reward": 0.5}\n')
    write_json(checkpoint / "state.json", {"epoch": 1, "images": 4, "manifest": True})
    names = ("evaluation_before.pt", "evaluation_after.pt")
    inner = ("zero/mp_rank_00_model_states.pt", "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for path in (*(run / name for name in names), *(checkpoint / name for name in inner)):
        torch.save({"seen": Program(trace), "module": Program(trace)}, path)
    files = {name: checkpoint_files.measure(checkpoint / name) for name in ("state.json", *inner)}
    checkpoint_files.write_manifest(checkpoint, files, kept=False)
    statuses = {
        command: cli.main(command.replace("RUN", str(run)).split())
        for command in (
            "report RUN", "watch RUN --once", "checkpoint list RUN", "checkpoint verify RUN", "checkpoint export RUN model",
            "checkpoint consolidate RUN weights.safetensors",
        )
    }  # fmt: skip
    assert not trace.exists()
    assert statuses["checkpoint verify RUN"] == statuses["report RUN"] == 0, "they were looked at"
    assert statuses["checkpoint export RUN model"] == 2 and not Path("model").exists()


# What is published, and what is not covered.

ADDRESS = "http://scorer.internal:8000"
REWARDS = f"[{{name: http, options: {{url: '{ADDRESS}', arguments: {{account: blue-42}}}}}}]"


def test_what_holds_reward_options_as_they_are(tmp_path: Path) -> None:
    settings = load_recipe("smoke", [f"rewards={REWARDS}"])
    record = Job.prepare(settings, "zero2.json", world_size=1, cuda=False).full_record()
    assert ADDRESS in json.dumps(record) and "blue-42" in json.dumps(record)
    request = EvaluationRequest(
        "tiny", rewards=(f"http:url={ADDRESS}",), prompts=("animals:train",), limit=2, output=tmp_path / "out"
    )
    assert ADDRESS in json.dumps(plan_evaluation(request, cuda=False).settings), "settings.json, and a part of evaluation.json"
    study = Study(title="a", question="b", recipe="smoke", settings={"rewards": REWARDS}, arms={"a": {}}, baseline="a")
    assert ADDRESS in study_page(study, {}, {}, None)


def test_an_exported_model_holds_no_reward_options(tmp_path: Path) -> None:
    settings = load_recipe("smoke", [f"rewards={REWARDS}", "evaluation.prompts=0"])
    pipeline = Pipeline.load(read_family(settings.model.pretrained), torch.device("cpu"), torch.float32)
    pipeline.export(tmp_path / "model", pipeline.denoiser.state_dict())
    write_model_card(
        tmp_path / "model", settings, pipeline.family, {"epochs": 1, "images": 2, "evaluation": {}}, tmp_path / "none"
    )
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(files) > 8 and not {path.name for path in files} & {"run.json", "settings.json", "evaluation.json", "study.md"}
    assert not [path for path in files if b"scorer.internal" in path.read_bytes() or b"blue-42" in path.read_bytes()]


def test_other_weights_are_another_digest_and_load_all_the_same(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(TINY, tmp_path / "model"))

    def digest() -> Any:
        settings = load_recipe("smoke", [f"model.pretrained={model}"])
        return Job.prepare(settings, "zero2.json", world_size=1, cuda=False).full_record()["content"]["model.pretrained"]

    first, path = digest(), next((model / "unet").glob("*.safetensors"))
    save_file({name: -value for name, value in load_file(path).items()}, path, {"format": "pt"})
    assert digest() != first
    Pipeline.load(str(model), torch.device("cpu"), torch.float32)


def test_a_file_in_the_run_directory_stops_a_job(tmp_path: Path) -> None:
    (tmp_path / ranks.RANKS).mkdir()
    ranks.join(tmp_path, "start", 0, 1)
    try:
        with watching(30.0) as watchdog:
            said = json.loads((tmp_path / "ranks/rank-00000.json").read_text())  # anybody who may read it knows the job
            write_json(tmp_path / "ranks/stop.json", {"job": said["job"], "reason": "a stranger", "status": 0})
            watchdog.look()
            assert stops.requested() == ("a stranger", 0)
    finally:
        ranks.forget()
