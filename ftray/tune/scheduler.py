"""Who gives a trial up: Ray Tune's schedulers, asked outside of Ray Tune's own loop.

Their decisions are a function of the reports in the order in which they came, so that a sweep that is continued puts
them where they were by telling them again. They compare trials at the same share of their steps, in percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from ftray.config import TuneConfig
from ftray.tune.state import SweepState

TIME, LOSS = "share", "loss"
Told = tuple[int, float, float]  # a trial's number, a share of its steps, its held-out loss there


@dataclass(frozen=True)
class _TrialView:
    """All that these schedulers ask of a trial."""

    trial_id: str


class _NoController:
    """All that they ask of Ray Tune's controller: no trial waits for another's place."""

    def get_live_trials(self) -> list[Any]:
        return []


class TrialPruner:
    """Decides after each held-out loss whether a trial goes on."""

    def __init__(self, tune: TuneConfig, state: SweepState) -> None:
        known = [(trial.number, report.share, report.loss) for trial, report in state.reports()]
        self._tune, self._told = tune, [told for told in known if math.isfinite(told[-1])]
        self._standing = _RayScheduler(tune)
        for told in self._told:
            self._standing.stops(told)

    def stops(self, number: int, share: float, loss: float) -> bool:
        """Whether a trial is given up at this share of its steps. One whose loss isn't finite always is.

        Successive halving as it stands lets the first trial that comes to a rung go on whatever follows, and so every one
        that is better than those before it. Here a trial goes on while it would if it came to its rungs only now.
        """
        if not math.isfinite(loss):
            return True
        told = (number, share, loss)
        self._told.append(told)
        if self._tune.scheduler != "asha":
            return self._standing.stops(told)
        anew = _RayScheduler(self._tune)
        for other in self._told:
            if other[0] != number:
                anew.stops(other)
        return any(anew.stops(own) for own in self._told if own[0] == number)


class _RayScheduler:
    """One of Ray Tune's schedulers, and which trials it knows."""

    def __init__(self, tune: TuneConfig) -> None:
        self._scheduler, self._known = _scheduler(tune), set[int]()

    def stops(self, told: Told) -> bool:
        """Tells it a loss; returns whether it gives the trial up."""
        number, share, loss = told
        trial, nobody = _TrialView(str(number)), _NoController()
        if number not in self._known:
            self._known.add(number)
            self._scheduler.on_trial_add(nobody, trial)
        action = self._scheduler.on_trial_result(nobody, trial, {TIME: 100 * share, LOSS: loss})
        return bool(action == TrialScheduler.STOP and share < 1)


def _scheduler(tune: TuneConfig) -> TrialScheduler:
    common = {"time_attr": TIME, "metric": LOSS, "mode": "min", "grace_period": 100 * tune.grace}
    if tune.scheduler == "asha":
        return AsyncHyperBandScheduler(max_t=100, reduction_factor=tune.reduction_factor, **common)
    if tune.scheduler == "median":
        return MedianStoppingRule(**common)
    return FIFOScheduler()
