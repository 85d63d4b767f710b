"""Agreement of raters: Krippendorff's alpha. Numpy only; knows no sheet.

Source: K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), sections C and E.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Level = Literal["nominal", "ordinal", "interval", "ratio"]


def alpha(values: ArrayLike, level: Level = "ordinal") -> float | None:
    """Krippendorff's alpha: 1 is full agreement, 0 what chance would give, below 0 systematic disagreement.

    alpha = 1 - D_o / D_e, the observed over the expected disagreement, both sums over the coincidence matrix.

    Args:
        values: [raters, units] numbers; nan where a rater said nothing of a unit. Units with one value are left out, since
            nothing can be paired.
        level: How values differ: `nominal` (the same or not), `ordinal` (ranks between them), `interval` (their
            difference), `ratio` (their difference over their sum; for values from 0 on).

    Returns:
        alpha, or None where it is not defined: no pair of values, or all values the same.
    """
    data = np.asarray(values, np.float64)
    if data.ndim != 2:
        return None
    data = data[:, (~np.isnan(data)).sum(axis=0) > 1]
    labels = np.unique(data[~np.isnan(data)])
    if len(labels) < 2:
        return None
    coincidences = _coincidences(data, labels)
    totals = coincidences.sum(axis=1)
    number = totals.sum()
    differences = _differences(labels, totals, level)
    observed = (coincidences * differences).sum() / number
    expected = (np.outer(totals, totals) * differences).sum() / (number * (number - 1))
    return float(1 - observed / expected)


def _coincidences(data: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.float64]:
    """o_ck = sum over units u of (number of c-k pairs in u) / (m_u - 1), with m_u the values of unit u."""
    counts = (data[:, :, None] == labels).sum(axis=0).astype(np.float64)  # [units, labels]
    weights = 1 / (counts.sum(axis=1) - 1)
    pairs = np.einsum("u,uc,uk->ck", weights, counts, counts)
    return pairs - np.diag(weights @ counts)  # a value makes no pair with itself


def _differences(labels: NDArray[np.float64], totals: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """The squared difference of each two labels."""
    if level == "nominal":
        return 1.0 - np.eye(len(labels))
    if level == "ordinal":  # values between two ranks, of which each end counts half
        middle = np.cumsum(totals) - totals / 2
        return np.subtract.outer(middle, middle) ** 2
    apart = np.subtract.outer(labels, labels)
    if level == "interval":
        return apart**2
    sums = np.add.outer(labels, labels)
    return np.divide(apart, sums, out=np.zeros_like(apart), where=sums != 0) ** 2
