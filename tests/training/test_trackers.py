"""Trackers: each epoch arrives once, over all starts of a run, and nothing that a tracker does holds up training."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from prdp_fast import train
from prdp_fast.config.load import load_recipe
from prdp_fast.config.tracking import (
    MlflowSettings,
    PrometheusSettings,
    TrackingSettings,
    WandbSettings,
    check_libraries,
    check_mlflow_secrets,
)  # fmt: skip
from prdp_fast.core.errors import UserError
from prdp_fast.core.run_directory import METRICS, first_difference
from prdp_fast.core.secret_words import without_secrets
from prdp_fast.reporting.private import recipe_for_others
from prdp_fast.training.state import TrainState
from prdp_fast.training.telemetry import Telemetry
from prdp_fast.training.trackers import build, feed
from prdp_fast.training.trackers.base import RunToTrack
from prdp_fast.training.trackers.feed import Feed, Sent
from prdp_fast.training.trackers.wandb import last_step, records


class Recorder:
    """A tracker that keeps what it gets, and fails as it is told to: one error a call."""

    name, remembers = "recorder", True

    def __init__(self, *faults: Exception | None) -> None:
        self.faults, self.got, self.begun, self.closed = list(faults), [], 0, None

    def _fail(self) -> None:
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault

    def begin(self) -> None:
        self.begun += 1
        self._fail()

    def scalars(self, step: int, values: dict[str, float], *, whole: bool) -> None:
        self._fail()
        self.got.append((step, dict(values)))

    def image(self, tag: str, path: Path, step: int) -> None:
        self.got.append((step, tag))

    def arrived(self) -> int | None:
        return None

    def close(self, finished: bool) -> None:
        self.closed = finished


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def send(one: Feed, *steps: int) -> None:
    for step in steps:
        one.put("epochs", step, lambda tracker, step=step: tracker.scalars(step, {"reward": step / 2}, whole=True))


# ------------------------------------------------------------------------------------------------------------------- the feed
def test_what_fails_is_sent_again_with_the_next_epoch_and_told_once_a_kind() -> None:
    told: list[str] = []
    tracker = Recorder(ConnectionError("no route"), None, TimeoutError("slow"), ConnectionError("no route"))
    one = Feed(tracker, told.append)
    for step in range(4):
        send(one, step)
        until(lambda: one.idle)
    one.finish(True)
    one.join(20)
    assert [step for step, _ in tracker.got] == [0, 1, 2, 3] and tracker.closed is True
    assert tracker.begun == 2, "once more after it failed, and not after a call that did"
    assert [("ConnectionError" in line, "TimeoutError" in line) for line in told] == [(True, False), (False, True)]
    assert all(f"training goes on, and {METRICS} has the same numbers" in line and "\n" not in line for line in told)


def test_a_call_that_never_works_is_left_out_after_three_tries() -> None:
    told: list[str] = []
    tracker = Recorder(None, *[ValueError("such a name")] * feed.MOST_TRIES)
    one = Feed(tracker, told.append)
    for step in range(4):
        send(one, step)
        until(lambda: one.idle)
    one.finish(True)
    one.join(20)
    assert [step for step, _ in tracker.got] == [1, 2, 3]
    assert len(told) == 2 and "has come to its end, without 1 of its rows" in told[1]


def test_a_tracker_that_hangs_holds_up_nothing() -> None:
    told: list[str] = []
    release = threading.Event()
    tracker = Recorder()
    tracker.begin = release.wait  # type: ignore[method-assign]
    one = Feed(tracker, told.append)
    start = time.monotonic()
    send(one, *range(feed.MOST_WAITING + 5))
    one.finish(True)
    one.join(0.1)
    assert time.monotonic() - start < 5
    assert told == [
        "WARNING: tracking.recorder has not come to its end in 0 s, without "
        f"{feed.MOST_WAITING + 5} of its rows; {METRICS} has all of them"
    ]
    release.set()


def test_what_was_sent_before_a_resume_is_not_sent_again(tmp_path: Path) -> None:
    """Killed after epoch 7 with a checkpoint of epoch 5; and a third start, from a checkpoint without the id."""

    def start(run_id: str | None, *steps: int) -> tuple[list[int], str]:
        sent = Sent.read(tmp_path / "trackers" / "recorder.json", run_id, lambda: "new")
        tracker = Recorder()
        one = Feed(tracker, print, sent)
        send(one, *steps)
        one.put("images", steps[0], lambda tracker: tracker.image("samples", Path(), steps[0]))
        one.finish(False)
        one.join(20)
        return [step for step, value in tracker.got if value != "samples"], sent.run_id

    assert start(None, *range(8)) == ([*range(8)], "new")
    assert start("new", *range(5, 10)) == ([8, 9], "new")
    assert start(None, *range(12)) == ([10, 11], "new"), "killed before its first checkpoint"
    assert start("other", 3, 4) == ([3, 4], "other"), "the file speaks of another run"
    (tmp_path / "trackers" / "recorder.json").write_text('{"run": ')
    assert start("other", 4, 5) == ([4, 5], "other"), "a damaged file knows nothing"


def test_what_did_not_arrive_is_sent_by_the_next_start(tmp_path: Path) -> None:
    """Of a tracker that buffers, and of one that is new: rows of metrics.jsonl make up for it."""
    run = RunToTrack(tmp_path, 3)
    made = build.Trackers(TrackingSettings(tensorboard=False), run, print)
    tracker = Recorder()
    tracker.arrived = lambda: 0  # type: ignore[method-assign]
    made.feeds = [Feed(tracker, print, Sent(tmp_path / "sent.json", "id", {"epochs": 9}, {"epochs": 9})), Feed(Recorder(), print)]
    other = made.feeds[1].tracker
    made.catch_up([{"schema": 1, "epoch": epoch, "reward": None if epoch == 1 else 0.5} for epoch in range(3)])
    made.epoch(3, {"reward": 1.0})
    made.close(True)
    assert [step for step, _ in tracker.got] == [1, 2, 3] and tracker.got[1:] == [(2, {"reward": 0.5}), (3, {"reward": 1.0})]
    assert list(tracker.got[0][1]) == ["reward"] and tracker.got[0][1]["reward"] != tracker.got[0][1]["reward"], "null was a NaN"
    assert [step for step, _ in other.got] == [3], "one that keeps nothing is not caught up with"


def test_no_secret_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "short")
    told: list[str] = []
    one = Feed(Recorder(ConnectionError("https://me:pw@host/x refused 0123456789abcdef\nand more")), told.append)
    send(one, 0)
    until(lambda: told)
    assert "https://***@host/x refused *** and more" in told[0]
    assert without_secrets("nothing secret in it, not even short", {"A_TOKEN": "short"}) == "nothing secret in it, not even short"


# ------------------------------------------------------------------------------------------------------------------ the recipe
def tracking(*overrides: str) -> TrackingSettings:
    return load_recipe("smoke", [f"tracking.{one}" for one in overrides]).tracking


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("wanbd={}", "unknown key 'wanbd' under 'tracking'; did you mean 'wandb'?"),
        ("wandb.api_key=x", "unknown key 'api_key' under 'tracking.wandb'"),
        ("wandb.mode=of", "tracking.wandb.mode: 'of'; expected online or offline"),
        ("mlflow.uri=https://me:pw@host", r"tracking.mlflow.uri: it holds a user or a password \(for https://host\)"),
        ("prometheus.port=70000", "tracking.prometheus.port is 70000"),
    ],
)
def test_the_section_is_checked(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tracking(override)
    assert "pw" not in str(caught.value).replace("'", "")


def test_a_tracker_whose_library_is_missing_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prdp_fast.config.tracking.find_spec", lambda name: None)
    check_libraries(tracking())
    for name in ("wandb", "mlflow", "prometheus"):
        with pytest.raises(UserError, match=rf"tracking.{name} needs .*pip install 'prdp-fast\[{name}\]'"):
            check_libraries(tracking(f"{name}={{}}"))


@pytest.mark.parametrize("secret", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_a_recipe_cannot_have_the_secret_of_mlflow_sent(secret: str) -> None:
    settings = tracking("mlflow={uri: 'https://theirs:5000/x'}")
    for own in ({}, {"MLFLOW_TRACKING_URI": "https://mine:5000"}, {"MLFLOW_TRACKING_URI": "http://theirs:5000"}):
        with pytest.raises(
            UserError, match=rf"{secret} would be sent there.*MLFLOW_TRACKING_URI=https://theirs:5000/x"
        ) as caught:
            check_mlflow_secrets(settings, own | {secret: "hunter2"})
        assert "hunter2" not in str(caught.value)
    check_mlflow_secrets(settings, {secret: "hunter2", "MLFLOW_TRACKING_URI": "https://theirs:5000"})
    check_mlflow_secrets(settings, {"MLFLOW_TRACKING_USERNAME": "me"})
    for harmless in ("mlflow={}", "mlflow={uri: 'file:///data/mlruns'}", "mlflow=null"):
        check_mlflow_secrets(tracking(harmless), {secret: "hunter2"})


def test_training_asks_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("prdp_fast.train.check_libraries", lambda settings: None)
    assert train.main(["--recipe", "smoke", "--set", "tracking.mlflow.uri=https://theirs", "--dry-run"]) == 2
    assert "MLFLOW_TRACKING_PASSWORD would be sent there" in capsys.readouterr().err


def test_a_resumed_run_may_be_tracked_otherwise() -> None:
    plain, tracked = ({"recipe": {"tracking": one.model_dump(mode="json")}} for one in (tracking(), tracking("wandb={}")))
    assert first_difference(plain, tracked) is None and first_difference({"recipe": {}}, tracked) is None
    assert first_difference({"recipe": {"trackings": 1}}, {"recipe": {"trackings": 2}}) is not None


def test_the_recipe_that_trackers_get_has_no_address_and_no_place() -> None:
    rewards = "[{name: http, options: {url: 'http://scorer.internal', token_env: PRDP_T}}]"
    settings = load_recipe(
        "smoke",
        [f"rewards={rewards}", "model.pretrained=/data/me/model", "tracking.mlflow.uri=http://mine",
         "prompts.source=s3://internal-bucket/set", "prompts.cache_dir=/data/me/cache"],
    )  # fmt: skip
    text = json.dumps(recipe_for_others(settings.model_dump(mode="json")))
    assert "internal" not in text and "PRDP_T" not in text and "/data/me" not in text and "mine" not in text
    assert '"pretrained": "model"' in text and '"source": "set"' in text


def test_ids_are_part_of_the_state() -> None:
    state = TrainState(epoch=2, trackers={"wandb": "abc"})
    assert TrainState.of(json.loads(json.dumps(state.state_dict()))).trackers == {"wandb": "abc"}
    old = state.state_dict()
    del old["trackers"]
    assert TrainState.of(old).trackers == {}


# ------------------------------------------------------------------------------------------------- a run in two starts, tracked
def picture(directory: Path) -> Path:
    path = directory / "grid.png"
    if not path.exists():
        directory.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (10, 200, 30)).save(path)
    return path


def two_starts(directory: Path, settings: TrackingSettings) -> str:
    """Epochs 0 to 3, killed in effect: the state is that after epoch 2. Then 2 to 4. Returns: the id."""
    ids: dict[str, str] = {}
    for first, last in ((0, 4), (2, 5)):
        with Telemetry(
            directory, total_epochs=5, first_epoch=first, tracking=settings, recipe={"seed": 3, "rewards": [{"name": "a"}]},
            run_ids=ids,
        ) as telemetry:  # fmt: skip
            ids = dict(telemetry.run_ids)
            for epoch in range(first, last):
                telemetry.log_epoch(epoch, {"reward": epoch / 2, "reward/a": float("nan"), "loss": 1.0}, 4)
                telemetry.log_scalars(epoch, {"evaluation/seen": epoch / 4})
            telemetry.log_image("samples/after", picture(directory), last - 1)
    (run_id,) = ids.values()
    assert [json.loads(line)["epoch"] for line in (directory / METRICS).read_text().splitlines()] == [*range(5)]
    return run_id


class FakeWandb(ModuleType):
    """The few calls that are used, as wandb 0.31 answers them: one run an id, and steps that only grow."""

    def __init__(self, key: bool = True) -> None:
        super().__init__("wandb")
        self.runs: dict[str, Any] = {}
        self.key, self.inits = key, []

    def login(self, *, prompt: bool) -> bool:
        assert prompt is False
        return self.key

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def Image(self, path: str) -> tuple[str, bytes]:
        return "image", Path(path).read_bytes()[:4]

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        run = self.runs.setdefault(options["id"], SimpleNamespace(history=[], exit_codes=[]))
        run.step = run.history[-1][0] + 1 if run.history else 0

        def log(values: dict[str, Any], step: int) -> None:
            assert not run.history or step >= run.history[-1][0], "wandb would leave it out"
            run.history.append((step, values))

        run.log, run.finish = log, lambda exit_code: run.exit_codes.append(exit_code)
        return run


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_id = two_starts(tmp_path / "my-run", TrackingSettings(tensorboard=False, wandb=WandbSettings(project="p", tags=["a"])))
    assert list(fake.runs) == [run_id]
    run = fake.runs[run_id]
    assert [step for step, values in run.history if "reward" in values] == [0, 1, 2, 3, 4]
    assert [step for step, values in run.history if "evaluation/seen" in values] == [0, 1, 2, 3, 4]
    assert run.history[-1] == (4, {"samples/after": ("image", b"\x89PNG")}) and run.exit_codes == [0, 0]
    first = fake.inits[0]
    assert (first["project"], first["name"], first["resume"], first["tags"]) == ("p", "my-run", "allow", ["a"])
    assert first["config"] == {"recipe": {"seed": 3, "rewards": [{"name": "a"}]}}
    assert (
        first["settings"].items() >= {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}.items()
    )


def test_wandb_without_a_key_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(key=False))
    two_starts(tmp_path / "run", TrackingSettings(tensorboard=False, wandb=WandbSettings()))
    printed = capsys.readouterr().out
    assert printed.count("WARNING: tracking.wandb: no API key; set WANDB_API_KEY") == 2, "once a start"


def test_wandb_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tmp_path / "run"
    settings = TrackingSettings(tensorboard=False, wandb=WandbSettings(mode="offline"))
    run_id = two_starts(directory, settings)
    rewards: list[tuple[int, float]] = []
    files = sorted(directory.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb"))
    text = b"".join(path.read_bytes() for path in files)
    for path in files:
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                if "reward" in values:
                    rewards.append((values["_step"], values["reward"]))
    assert rewards == [(epoch, epoch / 2) for epoch in range(5)]
    assert b"pytest" not in text, "the command line is nobody's business"

    # A killed process loses what wandb had in memory: what is missing comes from metrics.jsonl.
    assert [last_step(path) for path in files] == [3, 4]
    files[1].write_bytes(files[1].read_bytes()[:7])
    torn = files[0].read_bytes()
    for size in range(0, len(torn), 97):
        files[0].write_bytes(torn[:size])
        assert last_step(files[0]) <= 3
    files[0].write_bytes(torn[: len(torn) * 2 // 3])
    lost = last_step(files[0])
    assert 0 <= lost < 3
    with Telemetry(directory, total_epochs=5, first_epoch=4, tracking=settings, run_ids={"wandb": run_id}) as telemetry:
        telemetry.log_epoch(4, {"reward": 2.0}, 4)
    (newest,) = set(directory.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb")) - set(files)
    steps = []
    for data in records(newest.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            steps.append(record.history.step.num)
    assert steps == [*range(lost + 1, 5)]


class FakeMlflow:
    """The few calls of MlflowClient that are used, on one store for all clients."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, Any] = {}
        self.uris: list[str] = []

    def modules(self) -> dict[str, ModuleType]:
        mlflow, tracking, entities = ModuleType("mlflow"), ModuleType("mlflow.tracking"), ModuleType("mlflow.entities")
        tracking.MlflowClient = lambda tracking_uri: self.uris.append(tracking_uri) or self  # type: ignore[attr-defined]
        entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)  # type: ignore[attr-defined]
        entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)  # type: ignore[attr-defined]
        return {"mlflow": mlflow, "mlflow.tracking": tracking, "mlflow.entities": entities}

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[Any]:
        return [run for run in self.runs.values() if filter_string == f"tags.`prdp_fast.run` = '{run.tags['prdp_fast.run']}'"]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        number = f"run-{len(self.runs)}"
        info = SimpleNamespace(run_id=number)
        self.runs[number] = SimpleNamespace(
            info=info, name=run_name, tags=tags, metrics=[], params=[], files=[], status=["RUNNING"]
        )
        return self.runs[number]

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].status.append(status)

    set_terminated = update_run

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self.runs[run_id].metrics += metrics
        self.runs[run_id].params += params

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        self.runs[run_id].files.append((folder, Path(path).name))


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMlflow()
    for name, one in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, one)
    two_starts(tmp_path / "my-run", TrackingSettings(tensorboard=False, mlflow=MlflowSettings(uri="http://host")))
    (run,) = fake.runs.values()
    assert [(one.step, one.value) for one in run.metrics if one.key == "reward"] == [(epoch, epoch / 2) for epoch in range(5)]
    assert {one.key for one in run.metrics} >= {"reward.a", "loss", "evaluation.seen", "images_per_s"}
    assert {one.key: one.value for one in run.params} == {"seed": "3", "rewards.0.name": "a"}
    assert run.files == [("samples", "grid.png")] * 2 and run.name == "my-run" and set(fake.uris) == {"http://host"}
    assert run.status == ["RUNNING", "FINISHED", "RUNNING", "FINISHED"]


def test_mlflow_with_a_local_store_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    directory = tmp_path / "run"
    two_starts(directory, TrackingSettings(tensorboard=False, mlflow=MlflowSettings()))
    client = MlflowClient(tracking_uri=(directory / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("prdp_fast").experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward")
    assert [(one.step, one.value) for one in history] == [(epoch, epoch / 2) for epoch in range(5)]
    assert len(client.get_metric_history(run.info.run_id, "evaluation.seen")) == 5
    assert run.info.status == "FINISHED" and run.data.params["rewards.0.name"] == "a" and "reward.a" in run.data.metrics
    assert [one.path for one in client.list_artifacts(run.info.run_id, "samples")] == ["samples/grid.png"]


# ------------------------------------------------------------------------------------------------------------------ Prometheus
@contextmanager
def taken_port(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.socket() as held:
        held.bind((host, 0))
        held.listen()
        yield held.getsockname()[1]


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_prometheus_shows_the_last_epoch_on_loopback(tmp_path: Path, capsys) -> None:
    pytest.importorskip("prometheus_client")
    with taken_port() as port:
        pass
    settings = TrackingSettings(tensorboard=False, prometheus=PrometheusSettings(port=port))
    with Telemetry(tmp_path, total_epochs=2, tracking=settings) as telemetry:
        (one,) = telemetry._trackers.feeds  # type: ignore[union-attr]
        telemetry.log_epoch(0, {"reward": 0.25, "unscored": 2.0}, 4)
        telemetry.log_scalars(0, {"evaluation/seen": 0.75})
        telemetry.log_epoch(1, {"reward": 0.5, "reward/a": 0.125, "loss": float("nan")}, 4)
        until(lambda: one.idle)
        text = fetch(port)
        assert one.tracker._server.server_address[0] == "127.0.0.1"  # type: ignore[attr-defined]
    lines = text.splitlines()
    for expected in (
        'prdp_reward{of=""} 0.5', 'prdp_reward{of="a"} 0.125', 'prdp_loss{of=""} NaN', 'prdp_epoch{of=""} 1.0',
        'prdp_evaluation{of="seen"} 0.75', "# TYPE prdp_reward gauge",
    ):  # fmt: skip
        assert expected in lines, text
    assert "unscored" not in text, "it is the last epoch's numbers that count"
    assert any(line.startswith("# HELP prdp_reward mean total reward") for line in lines)
    with pytest.raises(OSError, match=r"refused|reset"):
        fetch(port)


def test_a_port_that_is_taken_is_one_line_and_training_goes_on(tmp_path: Path, capsys) -> None:
    pytest.importorskip("prometheus_client")
    with taken_port() as port:
        settings = TrackingSettings(tensorboard=False, prometheus=PrometheusSettings(port=port))
        with Telemetry(tmp_path, total_epochs=3, tracking=settings) as telemetry:
            (one,) = telemetry._trackers.feeds  # type: ignore[union-attr]
            for epoch in range(3):
                telemetry.log_epoch(epoch, {"reward": 0.5}, 4)
                until(lambda: one.idle)
    told = [line for line in capsys.readouterr().out.splitlines() if "cannot be listened on" in line]
    assert len(told) == 1 and f"tracking.prometheus: 127.0.0.1:{port} cannot be listened on" in told[0]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 3


def test_rank_0_alone_tracks() -> None:
    assert Telemetry(None, total_epochs=1, tracking=TrackingSettings(wandb=WandbSettings()))._trackers is None


def test_the_default_is_tensorboard_alone(tmp_path: Path) -> None:
    made = build.Trackers(TrackingSettings(), RunToTrack(tmp_path), print)
    assert [one.tracker.name for one in made.feeds] == ["tensorboard"] and made.run_ids == {}
