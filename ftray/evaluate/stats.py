"""How sure a share or a mean is. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054
BLOCK = 20_000_000  # weights in memory at once


@dataclass(frozen=True)
class Interval:
    """A value between the ends of its 95% interval, over `num` independent samples."""

    value: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{self.value:.3f}  [{self.low:.3f}, {self.high:.3f}]"


def wilson(scores: Sequence[float]) -> Interval:
    """Wilson's score interval (1927) of a mean of scores from 0 to 1.

    For scores of 0 and 1 it is the usual one. For others (ties count one half, several raters are averaged) it is wider
    than need be: among all scores of one mean, 0 and 1 vary most.
    """
    n = len(scores)
    mean = math.fsum(scores) / n
    middle = (mean + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    reach = Z_95 / (1 + Z_95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n**2))
    return Interval(mean, min(mean, max(0.0, middle - reach)), max(mean, min(1.0, middle + reach)), n)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The percentile bootstrap's interval (Efron 1979) of a mean; of paired differences: the paired bootstrap."""
    given = np.asarray(values, np.float64)
    means = [weights @ given / len(given) for weights in resamples(len(given), 10_000, seed)]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Interval(float(given.mean()), float(low), float(high), len(given))


def resamples(num: int, number: int, seed: int = 0) -> Iterator[npt.NDArray[np.float64]]:
    """How often each of `num` examples is in each of `number` resamples: blocks of [resamples, examples]."""
    rng, left = np.random.default_rng(seed), number
    while left:
        size = min(left, max(1, BLOCK // num))
        yield rng.multinomial(num, np.full(num, 1 / num), size=size).astype(np.float64)
        left -= size
