"""Confidence intervals of means and differences. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ftray.evaluate.metrics import Statistic

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """The difference of a metric between two models on the same examples, with its 95% interval.

    Attributes:
        num: Number of examples.
        ratio, ratio_low, ratio_high: The difference relative to the other model's metric; None if that is 0.
    """

    difference: float
    low: float
    high: float
    num: int
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def difference(new: Statistic, old: Statistic) -> Difference:
    """The difference `new` − `old` with the percentile interval of the paired bootstrap.

    Each resample takes the same examples of both models. The resamples are deterministic.

    Source: Efron 1979; Koehn 2004.
    """
    num = len(old.sums)
    pairs = [(new.value(w @ new.sums), old.value(w @ old.sums)) for w in resamples(num, NUM_RESAMPLES)]
    ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    value, base = new.over(), old.over()
    with np.errstate(invalid="ignore"):  # infinite perplexities
        low, high = np.nanpercentile(ours - theirs, (2.5, 97.5))
    ratio: tuple[float | None, float | None, float | None] = (None, None, None)
    if base and (theirs != 0).all():
        with np.errstate(invalid="ignore"):
            ends = np.nanpercentile(ours / theirs - 1, (2.5, 97.5))
        ratio = (value / base - 1, float(ends[0]), float(ends[1]))
    return Difference(value - base, float(low), float(high), num, *ratio)


Z_95 = 1.959963984540054
BLOCK = 20_000_000  # weights in memory at once


@dataclass(frozen=True)
class Interval:
    """A value with its 95% confidence interval, over `num` independent samples."""

    value: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{self.value:.3f}  [{self.low:.3f}, {self.high:.3f}]"


def wilson(scores: Sequence[float]) -> Interval:
    """Wilson's score interval (1927) of a mean of scores from 0 to 1.

    For other scores than 0 and 1 (ties count one half, several raters are averaged) the interval is conservative: for a given
    mean, scores of 0 and 1 have the largest variance.
    """
    n = len(scores)
    mean = math.fsum(scores) / n
    middle = (mean + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    reach = Z_95 / (1 + Z_95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n**2))
    return Interval(mean, min(mean, max(0.0, middle - reach)), max(mean, min(1.0, middle + reach)), n)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap interval (Efron 1979) of a mean. For paired differences it is the paired bootstrap."""
    sample = np.asarray(values, np.float64)
    means = [weights @ sample / len(sample) for weights in resamples(len(sample), 10_000, seed)]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Interval(float(sample.mean()), float(low), float(high), len(sample))


def resamples(num: int, number: int, seed: int = 0) -> Iterator[npt.NDArray[np.float64]]:
    """Counts of each of `num` examples in each of `number` resamples, as blocks of [resamples, examples]."""
    rng, left = np.random.default_rng(seed), number
    while left:
        size = min(left, max(1, BLOCK // num))
        yield rng.multinomial(num, np.full(num, 1 / num), size=size).astype(np.float64)
        left -= size
