"""Measures the speed for `ftray plan --probe` with a few real training steps, as a temporary run that is deleted."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ftray import config
from ftray.errors import RunError
from ftray.events.event_log import LoggedEvent
from ftray.events.types import TrainingStarted
from ftray.report.plan import ProbeResult

STEPS, WARM_UP = 10, 4  # the first steps are slower: memory is allocated, kernels are compiled


def probe_of(run: config.RunConfig) -> config.RunConfig:
    """The temporary run: a unique name, no evaluation, sweep or tracker."""
    return run.model_copy(
        update={
            "name": f"{run.name[:48]}-probe-{uuid.uuid4().hex[:8]}",
            "train": run.train.model_copy(update={"max_steps": STEPS}),
            "evaluate": run.evaluate.model_copy(update={"every": None, "early_stopping": None}),
            "checkpoint": run.checkpoint.model_copy(update={"every": STEPS}),
            "tune": None,
            "tracking": config.TrackingConfig(),
        }
    )


def probed(metrics: Sequence[Mapping[str, Any]], events: Sequence[LoggedEvent]) -> ProbeResult:
    """The measured speed. Raises RunError if too few steps were recorded."""
    steps = [line for line in metrics[WARM_UP:] if line.get("tokens_per_s")]
    start = next((each.event for each in reversed(events) if isinstance(each.event, TrainingStarted)), None)
    if not steps or start is None:
        raise RunError(f"the probe recorded only {len(metrics)} of {STEPS} steps; plan without --probe")
    speed, step_s = (median(each) for each in zip(*map(_speed, steps), strict=True))
    return ProbeResult(speed / start.workers, step_s, start.workers, start.device, len(steps))


def _speed(line: Mapping[str, Any]) -> tuple[float, float]:
    return line["tokens_per_s"], line["num_tokens"] / line["tokens_per_s"]
