"""Each planted fault raises its alert and no other; a healthy run raises none.

The metrics are synthetic; those of a real model are in test_alerts_trained.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytest

from ftray import config
from ftray.events.alerts import RULES, AlertMonitor
from ftray.events.bus import EventBus
from ftray.events.types import AlertRaised, EvalFinished, StepFinished, TrainingStarted, payload
from tests.events import step_finished


def run_of(**train: Any) -> config.RunConfig:
    tree = {"name": "a", "model": {"base": "b"}, "data": {"train": [{"path": "p"}]}}
    return config.parse_run({**tree, "train": {"global_batch_size": 4, **train}}, "test")


def line(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return payload(step_finished(step, loss=loss, **more))


def finished(line: dict[str, Any]) -> StepFinished:
    return StepFinished(**{name: value for name, value in line.items() if name != "eval_loss"})


def monitored(monitor: AlertMonitor) -> tuple[EventBus, list[AlertRaised]]:
    """A bus that a monitor follows, and the alerts that come on it."""
    bus, raised = EventBus(), list[AlertRaised]()
    bus.subscribe(AlertRaised, raised.append)

    def fail(text: str) -> None:
        raise AssertionError(text)

    monitor.subscribe(bus, fail)
    return bus, raised


def healthy(num_steps: int, seed: int, noise: float = 0.06) -> list[dict[str, Any]]:
    """A loss that falls from 2.8 to 1.2 with noise, held-out losses with it, waits and workers as they are."""
    rng = random.Random(seed)
    lines = []
    for n in range(num_steps):
        level = 1.2 + 1.6 * math.exp(-3.0 * n / num_steps) - 0.15 * n / num_steps
        slow = {"slowest_rank": rng.randrange(4), "slowest_by": 1 + rng.random() * 0.3}
        lines.append(line(n, level * (1 + rng.gauss(0, noise)), data_wait_s=rng.random() * 0.05, **slow))
        if n % 20 == 19:
            lines[-1]["eval_loss"] = level * 1.04 * (1 + rng.gauss(0, 0.002))
    return lines


def alerts(lines: Sequence[dict[str, Any]], num_steps: int = 0, **train: Any) -> list[AlertRaised]:
    """The alerts of a run with these metrics."""
    bus, raised = monitored(AlertMonitor(run_of(**train), num_steps or len(lines)))
    bus.emit(TrainingStarted(0))
    for each in lines:
        bus.emit(finished(each))
        if "eval_loss" in each:
            bus.emit(EvalFinished(each["step"] + 1, each["eval_loss"]))
    return raised


def kinds(lines: Sequence[dict[str, Any]], **how: Any) -> list[str]:
    return [alert.kind for alert in alerts(lines, **how)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_steps", "noise"), [(60, 0.1), (400, 0.06), (2000, 0.15)])
def test_a_run_that_is_well_raises_none_whatever_its_noise(seed: int, num_steps: int, noise: float) -> None:
    assert kinds(healthy(num_steps, seed, noise)) == []


def test_a_batch_that_gives_no_number_is_named_and_told_once() -> None:
    lines = healthy(100, 0)
    for step in (40, 41):
        lines[step] = line(step, math.nan, skipped=True)
    (alert,) = alerts(lines)
    assert (alert.kind, alert.step) == ("not finite", 40)
    assert "--steps 40:41" in alert.text
    lines[40] = line(40, 1.5, skipped=True)  # a gradient
    assert kinds(lines[:41]) == ["not finite"]
    assert kinds([line(0, 3.0, skipped=True, loss_scale=65536.0), *healthy(100, 0)[1:]]) == [], (
        "fp16 searches its scale"
    )
    lines[40] = line(40, None, skipped=True)  # type: ignore[arg-type] - as it is read again from metrics.jsonl
    assert kinds(lines[:41]) == ["not finite"]


def test_a_jump_that_comes_back_is_a_spike_and_one_that_stays_is_the_rate() -> None:
    lines = healthy(200, 1)
    lines[120]["loss"] = 9.0
    (alert,) = alerts(lines)
    assert (alert.kind, alert.step) == ("spike", 125)
    assert "at step 120 and came back" in alert.text
    for n in range(120, 200):
        lines[n]["loss"] = 5.0 + 0.01 * (n % 7)
    assert kinds(lines) == ["learning rate too high"]


def test_a_loss_that_rose_by_little_or_is_far_below_its_start_is_no_matter_of_the_rate() -> None:
    still = random.Random(7)
    lines = [line(n, (2.0 if n < 30 else 2.1) + still.gauss(0, 1e-3)) for n in range(60)]
    assert kinds(lines) == [], "5% more"
    lines = [line(n, (1.0 if n > 10 else 3.0) * (1.0 if n < 40 else 1.4) + still.gauss(0, 1e-3)) for n in range(80)]
    assert kinds(lines) == [], "40% above its best, and under half of its start"


def test_a_loss_that_goes_nowhere_is_told_while_much_is_left() -> None:
    lines = healthy(400, 2)
    level = median(each["loss"] for each in lines[140:160])
    rng = random.Random(5)
    stuck = [*lines[:150], *(line(n, level * (1 + rng.gauss(0, 0.01))) for n in range(150, 400))]
    (alert,) = alerts(stuck)
    assert alert.kind == "plateau"
    assert 200 < alert.step < 300
    assert "has not improved for 100 steps" in alert.text
    (never,) = alerts([line(n, 2.8 * (1 + rng.gauss(0, 0.01))) for n in range(400)])
    assert "the model does not learn" in never.text
    assert kinds(stuck[:330], num_steps=330) == ["plateau"]
    late = [*healthy(400, 2)[:340], *(line(n, 1.1) for n in range(340, 400))]
    assert kinds(late) == [], "at the end nothing is left to save"


def test_a_held_out_loss_that_rises_while_the_other_falls_is_told() -> None:
    lines = healthy(400, 6)
    for each in lines[200:]:
        each["loss"] *= 1 - 0.3 * (each["step"] - 200) / 200
        if "eval_loss" in each:
            each["eval_loss"] = lines[199]["eval_loss"] * (1 + (each["step"] - 199) / 400)
    (alert,) = alerts(lines)
    assert alert.kind == "overfitting"
    assert "(step 200)" in alert.text
    assert "evaluate.early_stopping" in alert.text


def test_a_held_out_loss_after_none_but_bad_steps_says_nothing_of_them() -> None:
    lines = healthy(400, 6)
    for each in lines[200:]:
        each["loss"] = None
        if "eval_loss" in each:
            each["eval_loss"] = 9.0 + each["step"]
    assert "overfitting" not in kinds(lines)


def test_data_that_is_waited_for_is_told_but_not_the_start_nor_one_long_wait() -> None:
    lines = healthy(100, 3)
    lines[0]["data_wait_s"] = lines[50]["data_wait_s"] = 30.0
    assert kinds(lines) == []
    for each in lines[50:]:
        each["data_wait_s"] = 0.4
    (alert,) = alerts(lines)
    assert alert.kind == "starving"
    assert "of the time, and GPUs idle" in alert.text
    assert alert.step == 65, "from when the window's waits, without the longest, are a fifth of its time"
    for each in lines:
        each["tokens_per_s"] = 40_000.0  # 25 ms a step: 2.5 s in all
        each["data_wait_s"] = 0.01
    assert kinds(lines) == [], "too short a time to matter"


def test_data_that_comes_late_after_a_start_counts_from_then_on() -> None:
    lines = healthy(120, 3)
    for each in lines[60:]:
        each["data_wait_s"] = 0.4
    bus, raised = monitored(AlertMonitor(run_of(), 120, before=lines[:60]))
    bus.emit(TrainingStarted(60))
    for each in lines[60:]:
        bus.emit(finished(each))
    (alert,) = raised
    assert (alert.kind, alert.step) == ("starving", 92), "three steps to settle, then thirty seconds"


def test_one_slow_worker_is_named_but_not_now_this_one_now_that() -> None:
    lines = healthy(100, 4)
    for each in lines[30:]:
        each |= {"slowest_rank": 2, "slowest_by": 2.2}
    (alert,) = alerts(lines)
    assert alert.kind == "straggler"
    assert alert.text.startswith("worker 2 takes 2.2 times as long")
    for n, each in enumerate(lines):
        each |= {"slowest_rank": n % 4, "slowest_by": 2.2}
    assert kinds(lines) == []


def test_steps_that_are_done_again_after_a_failure_count_once() -> None:
    monitor = AlertMonitor(run_of(), 200, before=healthy(200, 5)[:40])
    bus, raised = monitored(monitor)
    bus.emit(TrainingStarted(30))
    for each in healthy(200, 5)[30:]:
        bus.emit(finished(each))
    assert raised == []
    assert [each["step"] for each in monitor._lines] == list(range(200))


def test_every_alert_says_what_to_do() -> None:
    assert set(RULES) == {"not finite", "learning rate too high", "spike", "overfitting", "starving", "straggler"}
