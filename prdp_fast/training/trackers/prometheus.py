"""Prometheus: the last epoch's numbers as gauges, for a server that fetches them from http://host:port/metrics."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prdp_fast.config.tracking import PrometheusSettings
from prdp_fast.core import metric_names
from prdp_fast.training.trackers.base import RunToTrack, TrackerError

PREFIX = "prdp_"
LABEL = "of"  # what stands behind the first slash of a name


class Prometheus:
    """`reward` becomes prdp_reward, and `seconds/rollout` prdp_seconds{of="rollout"}."""

    name, remembers = "prometheus", False

    def __init__(self, settings: PrometheusSettings, run: RunToTrack) -> None:
        self.settings = settings
        self._row: Mapping[str, float] = {}  # of the last epoch; never changed, only replaced: another thread reads it
        self._others: Mapping[str, float] = {}
        self._server: Any = None

    def begin(self) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        place = f"{self.settings.host}:{self.settings.port}"
        try:
            self._server, self._thread = start_http_server(self.settings.port, self.settings.host, registry)
        except OSError as error:
            raise TrackerError(
                f"{place} cannot be listened on ({error.strerror or error}); expected a free port of this machine, set another "
                "tracking.prometheus.port"
            ) from error

    def collect(self) -> Iterator[Any]:
        """Called by the client's server for every request, in a thread of it."""
        from prometheus_client.core import GaugeMetricFamily

        families: dict[str, Any] = {}
        for name, value in (self._others | self._row).items():  # type: ignore[operator]
            first, _, rest = name.partition("/")
            metric = PREFIX + re.sub(r"\W", "_", first, flags=re.ASCII)
            if metric not in families:
                families[metric] = GaugeMetricFamily(metric, metric_names.describe(name), labels=[LABEL])
            families[metric].add_metric([rest], value)  # an empty label is no label
        yield from families.values()

    def arrived(self) -> int | None:
        return None

    def scalars(self, step: int, values: Mapping[str, float], *, whole: bool) -> None:
        if whole:
            self._row = {**values, "epoch": float(step), "epoch_time_seconds": time.time()}
        else:
            self._others = {**self._others, **values}

    def image(self, tag: str, path: Path, step: int) -> None:
        pass

    def close(self, finished: bool) -> None:
        self._server.shutdown()
        self._server.server_close()
