"""A replica's figures as Ray's own metrics, which Prometheus reads from each node, so that every replica is counted.

`/metrics` is the same for one replica: through the proxy a scrape reaches any of them.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.util.metrics import Gauge

from ftray.serve.metrics import ServeMetrics

EVERY_S = 5.0
_log = logging.getLogger("ray.serve")
SKIPPED = ("_created",)  # when a series began: of no use behind a gauge


class RayMetricsMirror:
    """Copies meters; replica: the name in the label of that name. A series ends with its replica."""

    def __init__(self, meters: ServeMetrics, replica: str) -> None:
        self._meters, self._replica = meters, replica
        self._gauges: dict[str, Any] = {}
        self._copied_s = -EVERY_S

    def copy(self) -> None:
        """Copies all of them, at most once in EVERY_S. Counters stay sums, histograms their buckets: `rate` works.

        Raises nothing: a replica is not ill because its figures can't be told.
        """
        if time.monotonic() - self._copied_s < EVERY_S:
            return
        self._copied_s = time.monotonic()
        try:
            self._copy()
        except Exception:  # noqa: BLE001 - whatever it is, answers go on
            _log.exception("the replica's figures could not be told to Ray's metrics")

    def _copy(self) -> None:
        self._meters.refresh()
        for family in self._meters.collect():
            for sample in family.samples:
                if sample.name.endswith(SKIPPED):
                    continue
                if sample.name not in self._gauges:
                    keys = (*sample.labels, "replica")
                    self._gauges[sample.name] = Gauge(sample.name, family.documentation, keys)
                self._gauges[sample.name].set(float(sample.value), {**sample.labels, "replica": self._replica})
