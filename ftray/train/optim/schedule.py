"""The learning-rate schedule, a pure function of the step: there is no state to resume."""

from __future__ import annotations

import math


def learning_rate(step: int, num_steps: int, peak: float, warmup: float, schedule: str) -> float:
    """Learning rate of optimizer step `step` (from 0).

    Rises linearly over the first warmup · num_steps steps, then follows `schedule`: cosine or linear, which reach 0
    after the last step, or constant.
    """
    num_warmup = math.ceil(warmup * num_steps - 1e-9)  # 0.07 * 100 is a little more than 7
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if schedule == "constant":
        return peak
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
