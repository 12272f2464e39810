"""The section `tracking` of a recipe: where a run's numbers go beside metrics.jsonl. A tracker that is null is off.

No option holds a secret: keys, tokens and passwords come from the environment, as each tracker's own client reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from prdp_fast.config.section import Section
from prdp_fast.core.errors import UserError

MLFLOW_URI, MLFLOW_SECRETS = "MLFLOW_TRACKING_URI", ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
LIBRARIES = {"wandb": "wandb", "mlflow": "mlflow", "prometheus": "prometheus_client"}  # by tracker, which is the extra's name too


class WandbSettings(Section):
    project: str = Field("prdp_fast", min_length=1)
    entity: str | None = Field(None, description="user or team; null: the account's own")
    group: str | None = None
    name: str | None = Field(None, description="of the run; null: its directory's")
    tags: list[str] = Field([])
    mode: str = Field("online", description="online, or offline: a folder in the run directory, for `wandb sync`")

    @field_validator("mode")
    @classmethod
    def _check_mode(cls, value: str) -> str:
        if value not in ("online", "offline"):
            raise ValueError(f"{value!r}; expected online or offline")
        return value


class MlflowSettings(Section):
    uri: str | None = Field(
        None, description="tracking server or file:// store; null: MLFLOW_TRACKING_URI, or a store in the run directory"
    )
    experiment: str = Field("prdp_fast", min_length=1)
    name: str | None = Field(None, description="of the run; null: its directory's")

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, value: str | None) -> str | None:
        if value is not None and "@" in urlsplit(value).netloc:
            place = re.sub(r"//[^/@]*@", "//", value)
            raise ValueError(
                f"it holds a user or a password (for {place}), which would be recorded; expected a URI without, and "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return value


class PrometheusSettings(Section):
    port: int = Field(9464, ge=1, le=65535, description="of http://host:port/metrics, on rank 0's machine")
    host: str = Field("127.0.0.1", min_length=1, description="the address it listens on; 0.0.0.0 lets others in")


class TrackingSettings(Section):
    tensorboard: bool = Field(True, description="event files in the run directory")
    wandb: WandbSettings | None = Field(None, description="Weights & Biases; needs the extra wandb")
    mlflow: MlflowSettings | None = Field(None, description="needs the extra mlflow")
    prometheus: PrometheusSettings | None = Field(
        None, description="gauges of the last epoch, to be scraped; needs the extra prometheus"
    )


def check_mlflow_secrets(settings: TrackingSettings, environment: Mapping[str, str]) -> None:
    """Raises: UserError if MLflow would send a secret to a server that only the recipe names: it may be somebody else's."""
    uri = settings.mlflow and settings.mlflow.uri
    secret = next((name for name in MLFLOW_SECRETS if environment.get(name)), None)
    if uri and secret and urlsplit(uri).scheme in ("http", "https") and not same_server(uri, environment.get(MLFLOW_URI, "")):
        raise UserError(
            f"tracking.mlflow.uri {uri}: {secret} would be sent there, and {MLFLOW_URI} does not name that server; export "
            f"{MLFLOW_URI}={uri} if the secret is for it, or unset {secret}"
        )


def same_server(uri: str, other: str) -> bool:
    return urlsplit(uri)[:2] == urlsplit(other)[:2]


def check_libraries(settings: TrackingSettings) -> None:
    """Raises: UserError if the recipe names a tracker whose library is not installed."""
    for name, library in LIBRARIES.items():
        if getattr(settings, name) is not None and find_spec(library) is None:
            raise UserError(
                f"tracking.{name} needs {library}, which is not installed; run pip install 'prdp-fast[{name}]', or set "
                f"tracking.{name} null"
            )
