"""Results of the ratings: win rate, scores, agreement. Pure functions of sheet, key and answers.

Samples are drawn at random, so every interval is over samples. Several ratings of a sample are averaged.
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
    """Krippendorff's alpha: 1 is full agreement, 0 chance level, below 0 systematic disagreement.

    alpha = 1 - D_o / D_e, the observed over the expected disagreement, both sums over the coincidence matrix.

    Args:
        values: [raters, units] numbers; nan if a rater did not rate a unit. Units with one value are left out, because they
            form no pair.
        level: How values differ: `nominal` (the same or not), `ordinal` (ranks between them), `interval` (their
            difference), `ratio` (their difference over their sum; for values from 0 on).

    Returns:
        alpha, or None if it is undefined: no pair of values, or all values the same.
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
    return pairs - np.diag(weights @ counts)  # a value forms no pair with itself


def _differences(labels: NDArray[np.float64], totals: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """The squared difference of each pair of labels."""
    if level == "nominal":
        return 1.0 - np.eye(len(labels))
    if level == "ordinal":  # values between two ranks; each end counts half
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
    """Mean scores from 1 to 5.

    Attributes:
        base: Mean of the base.
        tuned: Mean of the tuned model.
        change: Tuned minus base, on samples with scores of both.
        agreement: Krippendorff's alpha between raters.
    """

    base: float
    tuned: float
    change: Interval
    agreement: float | None


@dataclass(frozen=True)
class HumanResults:
    """The content of evaluate/human/results.json.

    Attributes:
        win_rate: Tuned over base; a tie counts one half.
        agreement: Krippendorff's alpha on the preferred side, over samples with several raters; None if there are none, or if
            all ratings are the same.
        num_shared: Samples with several raters.
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
    """Computes the results of all ratings so far."""
    numbers = range(1, len(sheet.samples) + 1)
    scores_of: dict[int, list[float]] = {n: [] for n in numbers}
    for ratings in answers.values():
        for n, answer in ratings.items():
            if answer.preferred is not None:
                scores_of[n].append(0.5 if answer.preferred == "same" else float(answer.preferred == key.tuned[n - 1]))
    all_scores = [score for scores in scores_of.values() for score in scores]
    means = {n: fmean(scores) for n, scores in scores_of.items() if scores}
    names = sorted({name for name in key.slices if name})
    slices = {name: [means[n] for n in means if key.slices[n - 1] == name] for name in names}
    return HumanResults(
        sheet=sheet.id,
        num_samples=len(sheet.samples),
        raters={r: sum(a.preferred is not None for a in ratings.values()) for r, ratings in sorted(answers.items())},
        wins=all_scores.count(1.0),
        ties=all_scores.count(0.5),
        losses=all_scores.count(0.0),
        win_rate=wilson(list(means.values())) if means else None,
        slices={name: wilson(scores) for name, scores in slices.items() if scores},
        criteria={name: c for name in sheet.criteria if (c := _criterion(name, key, answers)) is not None},
        agreement=alpha(_matrix(answers, numbers, lambda a: (_ORDER.get(a.preferred or ""),))),
        num_shared=sum(len(scores) > 1 for scores in scores_of.values()),
    )


def _criterion(name: str, key: SheetKey, answers: ByRater) -> Criterion | None:
    pairs: dict[int, list[tuple[int, int]]] = {}  # (base, tuned) of each rater who scored both
    for ratings in answers.values():
        for n, answer in ratings.items():
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
    """A row for each rater, with each sample's values side by side; missing values are nan."""
    rows = []
    for ratings in answers.values():
        row = [value for n in numbers for value in values(ratings.get(n, Rating()))]
        rows.append([np.nan if value is None else float(value) for value in row])
    return rows


def verdict(results: HumanResults) -> str:
    """The verdict on the win rate."""
    if results.win_rate is None:
        return "there are no ratings yet"
    if results.win_rate.low > 0.5:
        return "the tuned model is preferred"
    if results.win_rate.high < 0.5:
        return "the base is preferred"
    return "the difference is not significant"


def as_text(results: HumanResults) -> list[str]:
    """Lines of the table."""
    counts = ", ".join(f"{name} {number}" for name, number in results.raters.items()) or "none"
    lines = ["", f"human evaluation of {results.num_samples} samples; answers: {counts}"]
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
        agreement = (
            f"agreement on the better answer: {_known(results.agreement)} over {results.num_shared} shared samples"
        )
        lines.append(f"{agreement} (Krippendorff's alpha)")
    return [*lines, f"so far: {verdict(results)}" if _is_partial(results) else verdict(results)]


def _is_partial(results: HumanResults) -> bool:
    return results.win_rate is not None and results.win_rate.num < results.num_samples


def _known(agreement: float | None) -> str:
    return "–" if agreement is None else f"{agreement:.2f}"


def _cut(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"
