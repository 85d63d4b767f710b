"""A few steps of a run as it will be trained, for the speed that `plan` would otherwise reckon; nothing of them is kept.

They go through training itself: its data, loop, workers and cluster, as a run of another name that is deleted at the end.
"""

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

STEPS, WARM_UP = 10, 4  # taken; the first are slower: memory is found, kernels are compiled


def probe_of(run: config.RunConfig) -> config.RunConfig:
    """The run that is trained for the probe, under a name that no other has: no evaluation, sweep or tracker."""
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
    """What its steps were measured at. Raises RunError where too few of them are left."""
    steps = [line for line in metrics[WARM_UP:] if line.get("tokens_per_s")]
    start = next((each.event for each in reversed(events) if isinstance(each.event, TrainingStarted)), None)
    if not steps or start is None:
        raise RunError(f"the probe left {len(metrics)} of {STEPS} steps, too few to measure; plan without --probe")
    speed, step_s = (median(each) for each in zip(*map(_speed, steps), strict=True))
    return ProbeResult(speed / start.workers, step_s, start.workers, start.device, len(steps))


def _speed(line: Mapping[str, Any]) -> tuple[float, float]:
    return line["tokens_per_s"], line["num_tokens"] / line["tokens_per_s"]
