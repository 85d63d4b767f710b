"""Autoscaling by time to first token: Serve's own policy, and more replicas while first tokens are late.

Serve pickles this module into its controller, so it must not import ftray. Knows no engine and no HTTP.
"""

from __future__ import annotations

import time
from collections import deque
from statistics import fmean, median
from typing import Any

METRIC = "first_token_s"
WINDOW_S = 30.0


class TtftWindow:
    """Times to first token of a replica's answers in the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=1000)

    def add(self, first_s: float) -> None:
        self._seen.append((time.monotonic(), first_s))

    def median(self) -> float:
        """0 if there were no answers."""
        since = time.monotonic() - WINDOW_S
        return median([first_s for when, first_s in self._seen if when >= since] or [0.0])


class TtftPolicy:
    """Serve's policy (ongoing requests per replica), with more replicas while first tokens take longer than `target_s`.

    It at most doubles the replicas at a time, and removes none before first tokens take less than half of the target, because
    fewer
    replicas make all others slower. Serve applies bounds and delays.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy

        wanted, state = replica_queue_length_autoscaling_policy(ctx)
        running = ctx.current_num_replicas
        times = [s for s in (ctx.aggregated_metrics or {}).get(METRIC, {}).values() if s > 0]
        if running and times:
            ratio = fmean(times) / self._target_s
            if ratio > 1:
                wanted = max(wanted, running * min(2.0, ratio))
            elif ratio > 0.5:
                wanted = max(wanted, running)
        return wanted, state
