"""A run's figures while it trains, as Ray's own metrics: Prometheus reads them from the driver's node (docs/metrics.md).

Told the events that the driver shows. Reads and decides nothing; a figure that can't be told is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.util.metrics import Gauge

from ftray import config
from ftray.errors import ModelError
from ftray.report.gpu_specs import card_of, mfu
from ftray.report.model_shape import shape_of

PREFIX = "ray_"  # Ray puts it before every name
GAUGES = {
    "ftray_step": "Steps done",
    "ftray_planned_steps": "Steps in all",
    "ftray_loss": "Loss of the last step, the mean over its supervised tokens",
    "ftray_heldout_loss": "Held-out loss",
    "ftray_learning_rate": "Learning rate of the last step",
    "ftray_grad_norm": "Norm of the gradients before clipping",
    "ftray_tokens_per_second": "Tokens of all workers in a second of the last step, without padding",
    "ftray_padded_tokens_per_second": "The same with padding",
    "ftray_mfu": "Model FLOPs utilization of the last step, of the cards' dense 16-bit rate",
    "ftray_data_wait_share": "Share of the last step that waited for data",
    "ftray_peak_memory_gib": "Most memory that tensors took on rank 0's GPU",
    "ftray_goodput": "Share of this command's time that went into steps, each counted once",
    "ftray_workers": "Workers of the group under way",
    "ftray_restarts": "Times that workers were started anew in this command",
    "ftray_checkpoint_step": "Step of the last committed checkpoint",
    "ftray_checkpoint_unix_seconds": "When the last checkpoint was committed",
    "ftray_alarms": "Alarms so far, by kind",
}


class TrainingMetrics:
    """Of one run. name: its label, if not the run's own; warn: told once that something can't be told; now: unix seconds."""

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
        self._flops: Callable[[float], float] | None = None
        self._alarms: dict[str, int] = {}

    def heard(self, event: dict[str, Any]) -> None:
        """One event of rank 0, or of the driver: start, joined, step, heldout, checkpoint, alarm. Raises nothing."""
        try:
            self._heard(event)
        except Exception as err:  # noqa: BLE001 - whatever it is, the run goes on
            if not self._has_failed:
                self._has_failed = True
                self._warn(f"figures of this run can't be told to Ray's metrics ({type(err).__name__}: {err})")

    def _heard(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            self._groups += 1
            self._put("ftray_restarts", self._groups - 1)
            self._put("ftray_workers", event["workers"])
            self._put("ftray_planned_steps", event["num_steps"])
            self._flops = self._share_of(str(event.get("device")), int(event["workers"]))
        elif kind == "step":
            self._step(event)
        elif kind == "heldout":
            self._put("ftray_heldout_loss", event["heldout_loss"])
        elif kind == "checkpoint":
            self._put("ftray_checkpoint_step", event["step"])
            self._put("ftray_checkpoint_unix_seconds", self._now())
        elif kind == "alarm":
            name = str(event["kind"])
            self._alarms[name] = self._alarms.get(name, 0) + 1
            self._put("ftray_alarms", self._alarms[name], kind=name)

    def _step(self, event: dict[str, Any]) -> None:
        step, speed, tokens = int(event["step"]), float(event["tokens_per_s"]), int(event["num_tokens"])
        self._put("ftray_step", step + 1)
        for name in ("loss", "learning_rate", "grad_norm", "peak_memory_gib"):
            self._put(f"ftray_{name}", event.get(name))
        self._put("ftray_tokens_per_second", speed)
        if speed <= 0 or tokens <= 0:
            return
        duration_s = tokens / speed
        self._put(
            "ftray_padded_tokens_per_second",
            self._run.train.global_batch_size * self._run.data.max_seq_len / duration_s,
        )
        self._put("ftray_data_wait_share", event["data_wait_s"] / duration_s)
        if self._flops is not None:
            self._put("ftray_mfu", self._flops(speed))
        if step > self._furthest:  # one done again is time lost
            self._furthest, self._productive_s = step, self._productive_s + duration_s
        self._put("ftray_goodput", min(1.0, self._productive_s / max(duration_s, self._now() - self._began_s)))

    def _share_of(self, device: str, workers: int) -> Callable[[float], float] | None:
        """MFU by tokens a second; None where the card or the base's shape is not known."""
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
