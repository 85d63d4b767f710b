"""The learning rate: warm-up, shape, end; a function of the step alone."""

import pytest

from ftray.train.optim.schedule import learning_rate

PEAK = 2e-4


def rates(num_steps: int, warmup: float, schedule: str) -> list[float]:
    return [learning_rate(step, num_steps, PEAK, warmup, schedule) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    found = rates(100, 0.1, schedule)
    assert found[:10] == pytest.approx([PEAK * n / 10 for n in range(1, 11)])
    assert found[9] == found[10] == max(found) == PEAK


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_after_warm_up_the_schedule_has_its_shape(schedule: str, middle: float) -> None:
    found = rates(110, 1 / 11, schedule)
    assert found[10] == PEAK
    assert found[60] == pytest.approx(PEAK * middle)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_cosine_and_linear_end_at_zero_after_the_last_step() -> None:
    for schedule in ("cosine", "linear"):
        assert 0 < rates(50, 0.0, schedule)[-1] < PEAK * 0.03
        assert learning_rate(50, 50, PEAK, 0.0, schedule) == pytest.approx(0, abs=1e-12)
    assert rates(50, 0.0, "linear")[25] == pytest.approx(PEAK / 2)
    assert rates(40, 0.0, "cosine")[10] == pytest.approx(PEAK * (2 + 2**0.5) / 4)


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(20, 0.0, "constant")) == {PEAK}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(num_steps: int, warmup: float, schedule: str) -> None:
    assert all(0 < rate <= PEAK for rate in rates(num_steps, warmup, schedule))


def test_the_share_of_warm_up_is_counted_in_whole_steps() -> None:
    assert rates(100, 0.07, "constant").index(PEAK) == 6  # 0.07 * 100 is a little more than 7 in binary
    assert rates(10, 0.03, "constant").index(PEAK) == 0
