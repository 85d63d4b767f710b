"""Exports a replica's metrics as Ray metrics, which Prometheus reads from each node.

A scrape of `/metrics` goes through the proxy and reaches any one of the replicas; Ray's metrics cover all of them.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.util.metrics import Gauge

from ftray.serve.metrics import ServeMetrics

EVERY_S = 5.0
_log = logging.getLogger("ray.serve")
SKIPPED = ("_created",)  # start times of series: useless behind a gauge


class RayMetricsMirror:
    """Exports metrics to Ray.

    Args:
        metrics: The replica's metrics.
        replica: The value of the label `replica`. The series ends with the replica.
    """

    def __init__(self, metrics: ServeMetrics, replica: str) -> None:
        self._metrics, self._replica = metrics, replica
        self._gauges: dict[str, Any] = {}
        self._copied_s = -EVERY_S

    def copy(self) -> None:
        """Exports all metrics, at most once per EVERY_S. Counters stay sums and histograms stay buckets, so `rate` works.

        Raises nothing: a failed export does not make a replica unhealthy.
        """
        if time.monotonic() - self._copied_s < EVERY_S:
            return
        self._copied_s = time.monotonic()
        try:
            self._copy()
        except Exception:  # noqa: BLE001 - answers continue whatever the error is
            _log.exception("Could not export the replica's metrics to Ray")

    def _copy(self) -> None:
        self._metrics.refresh()
        for family in self._metrics.collect():
            for sample in family.samples:
                if sample.name.endswith(SKIPPED):
                    continue
                if sample.name not in self._gauges:
                    keys = (*sample.labels, "replica")
                    self._gauges[sample.name] = Gauge(sample.name, family.documentation, keys)
                self._gauges[sample.name].set(float(sample.value), {**sample.labels, "replica": self._replica})
