"""Krippendorff's alpha, held against the worked examples of the paper that defines its computation (2011)."""

import random

import numpy as np
import pytest

from ftray.evaluate.human.results import Level, alpha

NAN = float("nan")
# Example C: four observers, twelve units, five values, missing data.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]


@pytest.mark.parametrize(
    ("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)]
)
def test_the_papers_example_with_missing_data(level: Level, value: float) -> None:
    found = alpha(OBSERVERS, level)
    assert found is not None
    assert round(found, 3) == value


def test_the_papers_example_of_two_observers_and_binary_data() -> None:
    meg = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    owen = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    found = alpha([meg, owen], "nominal")
    assert found is not None
    assert round(found, 3) == 0.095


def test_the_papers_example_of_two_observers_and_nominal_data() -> None:
    ben = ["a", "a", "b", "b", "d", "c", "c", "c", "e", "d", "d", "a"]
    gerry = ["b", "a", "b", "b", "b", "c", "c", "c", "e", "d", "d", "d"]
    found = alpha([[ord(value) for value in said] for said in (ben, gerry)], "nominal")
    assert found is not None
    assert round(found, 3) == 0.692


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval", "ratio"])
def test_full_agreement_is_1_and_what_is_not_defined_is_none(level: Level) -> None:
    assert alpha([[1, 2, 3], [1, 2, 3]], level) == 1.0
    for undefined in ([], [[]], [[1, 2, 3]], [[1, 1], [1, 1]], [[1, NAN], [NAN, 2]], [[NAN], [NAN]]):
        assert alpha(undefined, level) is None


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval", "ratio"])
def test_neither_the_order_of_raters_nor_that_of_units_matters(level: Level) -> None:
    data = np.array(OBSERVERS)
    generator = np.random.default_rng(0)
    shuffled = data[generator.permutation(4)][:, generator.permutation(12)]
    assert alpha(shuffled, level) == pytest.approx(alpha(data, level))


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval", "ratio"])
def test_random_data_agree_with_the_definition_pair_by_pair(level: Level) -> None:
    rng = random.Random(3)
    for _ in range(20):
        data = [[rng.choice([0, 1, 2, 5, NAN]) for _ in range(9)] for _ in range(4)]
        expected = by_pairs(data, level)
        assert alpha(data, level) == (None if expected is None else pytest.approx(expected))


def by_pairs(data: list[list[float]], level: Level) -> float | None:
    """1 - D_o / D_e, with every pair of values counted one by one."""
    units = [[row[u] for row in data if row[u] == row[u]] for u in range(len(data[0]))]
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]

    def apart(c: float, k: float) -> float:
        if level == "nominal":
            return float(c != k)
        if level == "interval":
            return (c - k) ** 2
        if level == "ratio":
            return ((c - k) / (c + k)) ** 2 if c + k else 0.0
        low, high = min(c, k), max(c, k)
        return (sum(low <= g <= high for g in values) - (values.count(c) + values.count(k)) / 2) ** 2

    n = len(values)
    observed = sum(
        apart(a, b) / (len(unit) - 1)
        for unit in units
        for i, a in enumerate(unit)
        for j, b in enumerate(unit)
        if i != j
    )
    expected = sum(apart(a, b) for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    return None if expected == 0 else 1 - (observed / n) / (expected / (n * (n - 1)))
