"""What the ratings come to: win rate, scores, agreement. Pure functions of sheet, key and answers.

The sample is what is drawn at random, so every interval is over samples: several raters of one sample are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ftray.evaluate.human.answers import Rating
from ftray.evaluate.human.sheet import Sheet, SheetKey
from ftray.evaluate.stats import Interval, bootstrap, wilson

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


ByRater = Mapping[str, Mapping[int, Rating]]
_ORDER = {"a": 0.0, "same": 1.0, "b": 2.0}


@dataclass(frozen=True)
class Criterion:
    """Mean scores from 1 to 5; change: tuned less base, on samples where both were scored. agreement: of raters."""

    base: float
    tuned: float
    change: Interval
    agreement: float | None


@dataclass(frozen=True)
class HumanResults:
    """What evaluate/human/results.json holds. win_rate: tuned over base, a tie counts one half.

    agreement: Krippendorff's alpha on which side is preferred, over the samples that several raters answered; None
    where there are none, or where all said the same of all, which leaves nothing to agree on.
    """

    sheet: str
    num_samples: int
    raters: dict[str, int]
    wins: int
    ties: int
    losses: int
    win_rate: Interval | None
    slices: dict[str, Interval]
    criteria: dict[str, Criterion]
    agreement: float | None
    num_shared: int


def results_of(sheet: Sheet, key: SheetKey, answers: ByRater) -> HumanResults:
    """Counts and measures everything that was said so far."""
    numbers = range(1, len(sheet.samples) + 1)
    said: dict[int, list[float]] = {n: [] for n in numbers}
    for given in answers.values():
        for n, answer in given.items():
            if answer.preferred is not None:
                said[n].append(0.5 if answer.preferred == "same" else float(answer.preferred == key.tuned[n - 1]))
    all_said = [score for scores in said.values() for score in scores]
    means = {n: fmean(scores) for n, scores in said.items() if scores}
    names = sorted({name for name in key.slices if name})
    slices = {name: [means[n] for n in means if key.slices[n - 1] == name] for name in names}
    return HumanResults(
        sheet=sheet.id,
        num_samples=len(sheet.samples),
        raters={r: sum(a.preferred is not None for a in given.values()) for r, given in sorted(answers.items())},
        wins=all_said.count(1.0),
        ties=all_said.count(0.5),
        losses=all_said.count(0.0),
        win_rate=wilson(list(means.values())) if means else None,
        slices={name: wilson(scores) for name, scores in slices.items() if scores},
        criteria={name: c for name in sheet.criteria if (c := _criterion(name, key, answers)) is not None},
        agreement=alpha(_matrix(answers, numbers, lambda a: (_ORDER.get(a.preferred or ""),))),
        num_shared=sum(len(scores) > 1 for scores in said.values()),
    )


def _criterion(name: str, key: SheetKey, answers: ByRater) -> Criterion | None:
    pairs: dict[int, list[tuple[int, int]]] = {}  # (base, tuned) of each rater who scored both
    for given in answers.values():
        for n, answer in given.items():
            if name in answer.a and name in answer.b:
                both = (answer.b[name], answer.a[name]) if key.tuned[n - 1] == "a" else (answer.a[name], answer.b[name])
                pairs.setdefault(n, []).append(both)
    if not pairs:
        return None
    base = [fmean(b for b, _ in pairs[n]) for n in sorted(pairs)]
    tuned = [fmean(t for _, t in pairs[n]) for n in sorted(pairs)]
    matrix = _matrix(answers, range(1, len(key.tuned) + 1), lambda a: (a.a.get(name), a.b.get(name)))
    change = bootstrap([t - b for b, t in zip(base, tuned, strict=True)])
    return Criterion(fmean(base), fmean(tuned), change, alpha(matrix))


def _matrix(
    answers: ByRater, numbers: Sequence[int], values: Callable[[Rating], tuple[float | None, ...]]
) -> list[list[float]]:
    """A row for each rater, with each sample's values side by side; what was not said is nan."""
    rows = []
    for given in answers.values():
        row = [value for n in numbers for value in values(given.get(n, Rating()))]
        rows.append([np.nan if value is None else float(value) for value in row])
    return rows


def verdict(results: HumanResults) -> str:
    """The win rate in words."""
    if results.win_rate is None:
        return "nobody has said yet which answer is better"
    if results.win_rate.low > 0.5:
        return "the tuned model is preferred"
    if results.win_rate.high < 0.5:
        return "the base is preferred"
    return "neither is preferred beyond what chance would give"


def as_text(results: HumanResults) -> list[str]:
    """Lines of the table."""
    said = ", ".join(f"{name} {number}" for name, number in results.raters.items()) or "none"
    lines = ["", f"human evaluation of {results.num_samples} samples; answers: {said}"]
    if (rate := results.win_rate) is None:
        return [*lines, verdict(results)]
    lines.append(
        f"the tuned model's answer is better in {results.wins}, worse in {results.losses}, same in {results.ties}"
    )
    lines += ["", f"{'':<24}{'win rate':>10}{'95% interval':>18}{'samples':>10}"]
    for name, r in [("all", rate), *results.slices.items()]:
        lines.append(f"{_cut(name):<24}{r.value:>10.3f}{f'{r.low:.3f} to {r.high:.3f}':>18}{r.num:>10}")
    if results.criteria:
        lines += [
            "",
            f"{'':<24}{'base':>6}{'tuned':>7}{'change':>8}{'95% interval':>18}{'samples':>9}{'agreement':>11}",
        ]
    for name, c in results.criteria.items():
        interval = f"{c.change.low:+.2f} to {c.change.high:+.2f}"
        lines.append(
            f"{_cut(name):<24}{c.base:>6.2f}{c.tuned:>7.2f}{c.change.value:>+8.2f}{interval:>18}{c.change.num:>9}"
            f"{_known(c.agreement):>11}"
        )
    lines.append("")
    if len(results.raters) > 1:
        told = f"agreement on the better answer: {_known(results.agreement)} over {results.num_shared} shared samples"
        lines.append(f"{told} (Krippendorff's alpha)")
    return [*lines, f"so far {verdict(results)}" if _is_partial(results) else verdict(results)]


def _is_partial(results: HumanResults) -> bool:
    return results.win_rate is not None and results.win_rate.num < results.num_samples


def _known(agreement: float | None) -> str:
    return "–" if agreement is None else f"{agreement:.2f}"


def _cut(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"
