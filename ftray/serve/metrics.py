"""Metrics of one replica, in Prometheus' format at /metrics. Every metric carries the model that answered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from ftray.serve.drift import DriftFigures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_log = logging.getLogger(__name__)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = (16, 64, 256, 1024, 4096, 16384)


class ServeMetrics:
    """One replica's metrics.

    Attributes:
        refresh: Called before the metrics are read, to update those that are not counted as they happen.
    """

    def __init__(self) -> None:
        self.refresh: Callable[[], None] = lambda: None
        self._registry = CollectorRegistry()
        self.answers = Counter(
            "ftray_answers",
            "Answers by HTTP status",
            ["model", "status"],
            registry=self._registry,
        )
        self.tokens = Counter("ftray_tokens", "Prompt and answer tokens", ["model", "kind"], registry=self._registry)
        self.running = Gauge("ftray_answers_running", "Answers in progress", registry=self._registry)
        self.first_token = Histogram(
            "ftray_first_token_seconds",
            "Time from the request to the first text",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.answer = Histogram(
            "ftray_answer_seconds",
            "Time from the request to the end of the answer",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.prompt = Histogram(
            "ftray_prompt_tokens", "Prompt length in tokens", ["model"], buckets=_TOKENS, registry=self._registry
        )
        self.empty = Counter("ftray_empty_answers", "Answers without text", ["model"], registry=self._registry)
        self.feedback = Counter("ftray_feedback", "User feedback", ["model", "rating"], registry=self._registry)
        self.rejected = Counter(
            "ftray_adapters_rejected",
            "Registry entries that are not served, by reason; each version counts once",
            ["reason"],
            registry=self._registry,
        )
        self.models = Gauge("ftray_models", "Models that clients can request", registry=self._registry)

        self._drift = {
            field: Gauge(f"ftray_drift_{field}", text, ["model"], registry=self._registry)
            for field, text in (
                (
                    "prompt_tokens",
                    "Population stability index of prompt lengths against training (above 0.25: a shift)",
                ),
                ("scripts", "Share of letters in scripts that training did not have"),
                ("empty", "Share of recent answers without text"),
            )
        }

    def show_drift(self, model: str, figures: DriftFigures) -> None:
        """Sets a model's drift gauges. Unknown values are left out."""
        for field, gauge in self._drift.items():
            if (value := getattr(figures, field)) is not None:
                gauge.labels(model).set(value)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format. If a refresh fails, it logs the error and returns the previous values."""
        try:
            self.refresh()
        except Exception:  # noqa: BLE001 - a replica without metrics would be taken for dead
            _log.exception("Could not refresh the metrics")
        return bytes(generate_latest(self._registry))

    def collect(self) -> Iterable[Metric]:
        """The metrics as objects, as of the last refresh."""
        return self._registry.collect()
