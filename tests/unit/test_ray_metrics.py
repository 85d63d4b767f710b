"""A replica's figures among Ray's: what can't be counted takes no replica down."""

from __future__ import annotations

from typing import Any

import pytest

from ftray.serve import ray_metrics
from ftray.serve.metrics import ServeMetrics
from ftray.serve.ray_metrics import RayMetricsMirror


class Recorded:
    """Ray's gauge."""

    def __init__(self, name: str, _: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.keys)
        TOLD[(self.name, *sorted(tags.items()))] = value


TOLD: dict[Any, float] = {}


def test_counters_and_buckets_are_copied_and_a_fault_in_them_is_not_the_replicas(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_metrics, "Gauge", Recorded)
    monkeypatch.setattr(ray_metrics, "EVERY_S", 0.0)
    TOLD.clear()
    meters = ServeMetrics()
    copied = RayMetricsMirror(meters, "r1")
    meters.answers.labels("m", "200").inc(3)
    meters.first_token.labels("m").observe(0.3)
    copied.copy()
    replica = ("replica", "r1")
    assert TOLD["ftray_answers_total", ("model", "m"), replica, ("status", "200")] == 3
    assert TOLD["ftray_first_token_seconds_bucket", ("le", "0.25"), ("model", "m"), replica] == 0
    assert TOLD["ftray_first_token_seconds_bucket", ("le", "0.5"), ("model", "m"), replica] == 1
    assert not any(name.endswith("_created") for name, *_ in TOLD)

    def broken() -> None:
        raise TypeError("deciles are text")

    meters.refresh = broken
    meters.answers.labels("m", "200").inc()
    copied.copy()
    assert "deciles are text" in caplog.text
    meters.refresh = lambda: None
    copied.copy()
    assert TOLD["ftray_answers_total", ("model", "m"), replica, ("status", "200")] == 4
