"""How sure a difference is: the paired bootstrap. Pure functions of numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ftray.evaluate.metrics import Statistic
from ftray.evaluate.stats import resamples

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """One model's figure less another's on the same examples, with its 95% interval. num: of the examples.

    ratio, ratio_low, ratio_high: the same as a share of the other's figure, or None where that is 0.
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
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def difference(new: Statistic, old: Statistic) -> Difference:
    """`new` less `old`: percentile interval of the paired bootstrap (Efron 1979; Koehn 2004).

    Each resample takes the same examples of both. The same numbers give the same interval.
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
