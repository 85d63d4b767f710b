"""Exports a run's training metrics as Ray gauges, for Prometheus (docs/metrics.md).

Subscribes to the events of the run and never changes it. A metric without a value is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.util.metrics import Gauge

from ftray import config
from ftray.errors import ModelError
from ftray.events.bus import E, EventBus
from ftray.events.types import AlertRaised, CheckpointStarted, EvalFinished, StepFinished, TrainingStarted
from ftray.report.gpu_specs import card_of, mfu
from ftray.report.model_shape import shape_of

PREFIX = "ray_"  # Ray puts it before every name
GAUGES = {
    "ftray_step": "Optimizer steps done",
    "ftray_planned_steps": "Optimizer steps of the whole run",
    "ftray_loss": "Loss of the last step, the mean over its trained tokens",
    "ftray_eval_loss": "Eval loss",
    "ftray_learning_rate": "Learning rate of the last step",
    "ftray_grad_norm": "Gradient norm before clipping",
    "ftray_tokens_per_second": "Tokens per second over all workers in the last step, without padding",
    "ftray_padded_tokens_per_second": "Tokens per second over all workers in the last step, with padding",
    "ftray_mfu": "Model FLOPs utilization of the last step, relative to the GPUs' dense 16-bit peak",
    "ftray_data_wait_share": "Share of the last step spent waiting for data",
    "ftray_peak_memory_gib": "Peak of allocated memory on rank 0's GPU",
    "ftray_goodput": "Share of this command's time spent in steps, each counted once",
    "ftray_workers": "Workers of the current group",
    "ftray_restarts": "Restarts of the workers in this command",
    "ftray_checkpoint_step": "Step of the last checkpoint",
    "ftray_checkpoint_unix_seconds": "Unix time of the last checkpoint",
    "ftray_alerts": "Alerts so far, by kind",
}


class TrainingMetrics:
    """Gauges of one run.

    Args:
        run: The run's configuration.
        now: Unix time in seconds; tests replace it.
        warn: Gets one message if exporting fails.
        name: Value of the label `run`; the run's name by default.
    """

    def __init__(
        self,
        run: config.RunConfig,
        now: Callable[[], float] = time.time,
        warn: Callable[[str], None] = lambda _: None,
        name: str | None = None,
    ) -> None:
        self._name = name or run.name
        self._warn, self._has_failed = warn, False
        self._run, self._now, self._began_s = run, now, now()
        self._gauges: dict[str, Any] = {}
        self._groups, self._productive_s, self._furthest = 0, 0.0, -1
        self._mfu: Callable[[float], float] | None = None
        self._alerts: dict[str, int] = {}

    def subscribe(self, bus: EventBus) -> None:
        """Subscribes its handlers. They raise nothing."""
        bus.subscribe(TrainingStarted, self._guarded(self._started))
        bus.subscribe(StepFinished, self._guarded(self._step))
        bus.subscribe(EvalFinished, self._guarded(self._eval))
        bus.subscribe(CheckpointStarted, self._guarded(self._checkpoint))
        bus.subscribe(AlertRaised, self._guarded(self._alert))

    def _guarded(self, handler: Callable[[E], None]) -> Callable[[E], None]:
        def handle(event: E) -> None:
            try:
                handler(event)
            except Exception as err:  # noqa: BLE001 - metrics never end a run
                if not self._has_failed:
                    self._has_failed = True
                    self._warn(f"Could not export this run's metrics to Ray ({type(err).__name__}: {err})")

        return handle

    def _started(self, event: TrainingStarted) -> None:
        self._groups += 1
        self._put("ftray_restarts", self._groups - 1)
        self._put("ftray_workers", event.workers)
        self._put("ftray_planned_steps", event.num_steps)
        self._mfu = self._mfu_by_speed(event.device, event.workers)

    def _eval(self, event: EvalFinished) -> None:
        self._put("ftray_eval_loss", event.eval_loss)

    def _checkpoint(self, event: CheckpointStarted) -> None:
        self._put("ftray_checkpoint_step", event.step)
        self._put("ftray_checkpoint_unix_seconds", self._now())

    def _alert(self, event: AlertRaised) -> None:
        self._alerts[event.kind] = self._alerts.get(event.kind, 0) + 1
        self._put("ftray_alerts", self._alerts[event.kind], kind=event.kind)

    def _step(self, event: StepFinished) -> None:
        step, speed, tokens = event.step, event.tokens_per_s, event.num_tokens
        self._put("ftray_step", step + 1)
        self._put("ftray_loss", event.loss)
        self._put("ftray_learning_rate", event.learning_rate)
        self._put("ftray_grad_norm", event.grad_norm)
        self._put("ftray_peak_memory_gib", event.peak_memory_gib)
        self._put("ftray_tokens_per_second", speed)
        if speed <= 0 or tokens <= 0:
            return
        duration_s = tokens / speed
        self._put(
            "ftray_padded_tokens_per_second",
            self._run.train.global_batch_size * self._run.data.max_seq_len / duration_s,
        )
        self._put("ftray_data_wait_share", event.data_wait_s / duration_s)
        if self._mfu is not None:
            self._put("ftray_mfu", self._mfu(speed))
        if step > self._furthest:  # a repeated step is lost time
            self._furthest, self._productive_s = step, self._productive_s + duration_s
        self._put("ftray_goodput", min(1.0, self._productive_s / max(duration_s, self._now() - self._began_s)))

    def _mfu_by_speed(self, device: str, workers: int) -> Callable[[float], float] | None:
        """MFU as a function of tokens per second; None if the GPU or the base's shape is unknown."""
        card = card_of(device)
        if card is None:
            return None
        try:
            shape = shape_of(self._run.model)
        except ModelError:
            return None
        method, gpus = self._run.method, workers * self._run.scale.gpus_per_worker
        return lambda speed: mfu(shape, method, card, gpus, speed)

    def _put(self, name: str, value: float | None, **tags: str) -> None:
        if value is None:
            return
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, GAUGES[name], ("run", *tags))
        self._gauges[name].set(float(value), {"run": self._name, **tags})
