"""MLflow: a tracking server, or a store of files."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prdp_fast.config.tracking import MlflowSettings
from prdp_fast.training.trackers.base import RunToTrack

ID_TAG = "prdp_fast.run"  # holds our id of the run: MLflow's own is the server's to choose
STORE = "mlruns"  # in the run directory
AT_ONCE = 500  # metrics of one request; a server takes 1000
MOST_PARAMETER = 500  # characters of a parameter's value


class Mlflow:
    """One run, found again by the tag that holds its id. Epochs are its steps."""

    name, remembers = "mlflow", True

    def __init__(self, settings: MlflowSettings, run: RunToTrack, run_id: str) -> None:
        self.settings, self.run_to_track, self.run_id = settings, run, run_id
        self.client: Any = None
        self.mlflow_run = ""

    def begin(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing goes anywhere that nobody asked for
        from mlflow.tracking import MlflowClient

        uri = (
            self.settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or (self.run_to_track.directory.resolve() / STORE).as_uri()
        )
        if uri.startswith("file:") or "://" not in uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # since MLflow 3 a store of files has to be asked for
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self.client.get_experiment_by_name(self.settings.experiment)
        number = experiment.experiment_id if experiment else self.client.create_experiment(self.settings.experiment)
        found = self.client.search_runs([number], filter_string=f"tags.`{ID_TAG}` = '{self.run_id}'", max_results=1)
        if found:
            self.mlflow_run = found[0].info.run_id
            self.client.update_run(self.mlflow_run, status="RUNNING")
            return
        self.mlflow_run = self.client.create_run(
            number, run_name=self.settings.name or self.run_to_track.name, tags={ID_TAG: self.run_id}
        ).info.run_id
        self.client.log_batch(self.mlflow_run, params=parameters(self.run_to_track.recipe)[:100])

    def arrived(self) -> int | None:
        return None

    def scalars(self, step: int, values: Mapping[str, float], *, whole: bool) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(allowed(name), float(value), now, step) for name, value in values.items()]
        for first in range(0, len(metrics), AT_ONCE):
            self.client.log_batch(self.mlflow_run, metrics=metrics[first : first + AT_ONCE])

    def image(self, tag: str, path: Path, step: int) -> None:
        self.client.log_artifact(self.mlflow_run, str(path), str(Path(tag).parent))

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.mlflow_run, status="FINISHED" if finished else "KILLED")


def allowed(name: str) -> str:
    """A metric's name as MLflow takes it: with a dot for each slash, for a store of files cannot hold both `reward` and what
    would be in a folder of that name."""
    return re.sub(r"[^\w. -]", "_", name.replace("/", "."))[:250]


def parameters(recipe: Mapping[str, Any]) -> list[Any]:
    """A recipe's values by their dotted keys."""
    from mlflow.entities import Param

    found = []

    def walk(value: Any, key: str) -> None:
        items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
        if items is None or not value:
            found.append(Param(allowed(key), str(value)[:MOST_PARAMETER]))
            return
        for name, inner in items:
            walk(inner, f"{key}.{name}" if key else str(name))

    walk(recipe, "")
    return [one for one in found if one.key]
