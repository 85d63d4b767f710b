"""What a replica tells Prometheus at /metrics. Counts; decides nothing. Every figure carries the model that answered."""

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
    """One replica's figures. refresh: called before they are read, for what isn't counted as it happens."""

    def __init__(self) -> None:
        self.refresh: Callable[[], None] = lambda: None
        self._registry = CollectorRegistry()
        self.answers = Counter(
            "ftray_answers",
            "Answers, by the HTTP status they began or ended with",
            ["model", "status"],
            registry=self._registry,
        )
        self.tokens = Counter("ftray_tokens", "Tokens read and written", ["model", "kind"], registry=self._registry)
        self.running = Gauge("ftray_answers_running", "Answers under way", registry=self._registry)
        self.first_token = Histogram(
            "ftray_first_token_seconds",
            "From request to first text",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.answer = Histogram(
            "ftray_answer_seconds", "From request to the end", ["model"], buckets=_SECONDS, registry=self._registry
        )
        self.prompt = Histogram(
            "ftray_prompt_tokens", "Length of prompts", ["model"], buckets=_TOKENS, registry=self._registry
        )
        self.empty = Counter("ftray_empty_answers", "Answers without text", ["model"], registry=self._registry)
        self.feedback = Counter("ftray_feedback", "Opinions of users", ["model", "rating"], registry=self._registry)
        self.rejected = Counter(
            "ftray_adapters_rejected",
            "Entries of the registry that are not served, each version once, by the kind of reason",
            ["reason"],
            registry=self._registry,
        )
        self.models = Gauge("ftray_models", "Models that may be asked for", registry=self._registry)

        self._drift = {
            field: Gauge(f"ftray_drift_{field}", text, ["model"], registry=self._registry)
            for field, text in (
                ("prompt_tokens", "Stability index of prompts' lengths against training (above 0.25: a shift)"),
                ("scripts", "Share of letters in other scripts than in training"),
                ("empty", "Share of the last answers without text"),
            )
        }

    def show_drift(self, model: str, figures: DriftFigures) -> None:
        """Sets a model's gauges; what is unknown stays out."""
        for field, gauge in self._drift.items():
            if (value := getattr(figures, field)) is not None:
                gauge.labels(model).set(value)

    def render(self) -> bytes:
        """In Prometheus' text format. A refresh that fails is logged, and the figures are those of before."""
        try:
            self.refresh()
        except Exception:  # noqa: BLE001 - a replica without figures would be taken for dead
            _log.exception("the figures could not be refreshed")
        return bytes(generate_latest(self._registry))

    def collect(self) -> Iterable[Metric]:
        """The same as objects, as of the last refresh."""
        return self._registry.collect()
