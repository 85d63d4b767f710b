"""Early stopping of trials: asynchronous successive halving and the median rule.

A decision is a pure function of the reports that came before it. A resumed sweep therefore makes the same decisions.
Trials are compared at the same share of their steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from ftray.config import TuneConfig
from ftray.tune.state import SweepState

MIN_TRIALS = 3  # that the median rule compares with


@dataclass(frozen=True)
class Report:
    """An eval loss of a trial at a share of its steps (0 to 1)."""

    trial: int
    share: float
    loss: float


class TrialPruner:
    """Decides after each eval whether a trial continues.

    Source: ASHA is Li et al. 2018, "A System for Massively Parallel Hyperparameter Tuning". The median rule is Golovin et
    al. 2017, "Google Vizier".
    """

    def __init__(self, tune: TuneConfig, state: SweepState) -> None:
        known = [Report(trial.number, report.share, report.loss) for trial, report in state.reports()]
        self._tune = tune
        self._reports = [report for report in known if math.isfinite(report.loss)]

    def stops(self, number: int, share: float, loss: float) -> bool:
        """Whether the trial `number` stops here. A trial whose loss is not finite always stops."""
        if not math.isfinite(loss):
            return True
        report = Report(number, share, loss)
        self._reports.append(report)
        if share >= 1 or share < self._tune.grace:
            return False
        if self._tune.scheduler == "asha":
            return self._is_below_a_rung(number)
        if self._tune.scheduler == "median":
            return self._is_below_the_median(report)
        return False

    def _is_below_a_rung(self, number: int) -> bool:
        """Compares the trial with all others at each rung that it has passed, also with those that passed it later.

        Plain successive halving compares only once, when a trial reaches a rung. The first trial to arrive would always
        continue, and so would every trial that is better than all before it.
        """
        rung = self._tune.grace
        while rung < 1:
            losses: dict[int, float] = {}
            for report in self._reports:
                if report.share >= rung - 1e-9:  # 0.1 × 3 is more than 0.3
                    losses.setdefault(report.trial, report.loss)
            own = losses.pop(number, None)
            if own is None:
                return False
            if losses and own > np.quantile(list(losses.values()), 1 / self._tune.reduction_factor):
                return True
            rung *= self._tune.reduction_factor
        return False

    def _is_below_the_median(self, report: Report) -> bool:
        """Compares the trial's best loss with the median of the other trials' mean losses up to this share."""
        others: dict[int, list[float]] = {}
        best = report.loss
        reached = {r.trial for r in self._reports if r.share >= report.share}
        for earlier in self._reports:
            if earlier.trial == report.trial:
                best = min(best, earlier.loss)
            elif earlier.trial in reached and earlier.share <= report.share:
                others.setdefault(earlier.trial, []).append(earlier.loss)
        return len(others) >= MIN_TRIALS and best > median(fmean(losses) for losses in others.values())
