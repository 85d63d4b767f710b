"""Gauges of a run: goodput with repeated steps, MFU of known GPUs, alerts."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from ftray import config
from ftray.events.bus import EventBus
from ftray.events.types import (
    AlertRaised,
    MemoryPlanned,
    PhaseStarted,
    StepFinished,
    TrainingStarted,
    WeightsRewound,
    WorkersJoined,
)
from ftray.report import ray_metrics
from ftray.report.gpu_specs import CARDS, mfu
from ftray.report.model_shape import shape_of
from ftray.report.ray_metrics import TrainingMetrics
from tests.events import step_finished


class Recorded:
    """Ray's gauge, of which it has a name, a description and the labels' names."""

    values: ClassVar[dict[tuple[str, ...], float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self._name, self._keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._keys)
        self.values[(self._name, *tags.values())] = value


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    monkeypatch.setattr(ray_metrics, "Gauge", Recorded)
    Recorded.values.clear()
    return Recorded.values


def run_of() -> config.RunConfig:
    data = {"train": [{"path": "nowhere"}], "max_seq_len": 1000}
    tree = {"name": "g", "model": {"base": "meta-llama/Llama-3.1-8B"}, "data": data}
    return config.parse_run({**tree, "train": {"global_batch_size": 4}, "scale": {"num_workers": 2}}, "test")


def step(number: int, **more: Any) -> StepFinished:
    line = {"num_tokens": 3000, "tokens_per_s": 300.0, "data_wait_s": 0.5}
    return step_finished(number, **{**line, **more})


def followed(metrics: TrainingMetrics) -> EventBus:
    bus = EventBus()
    metrics.subscribe(bus)
    return bus


def test_steps_done_again_are_no_goodput(told: dict[tuple[str, ...], float]) -> None:
    clock = [0.0]
    found = followed(TrainingMetrics(run_of(), lambda: clock[0]))
    for number, now in ((0, 10.0), (1, 20.0), (2, 30.0)):
        clock[0] = now
        found.emit(step(number))
    assert told["ftray_goodput", "g"] == pytest.approx(1.0)
    clock[0] = 60.0
    found.emit(step(1))  # a failure: from the last checkpoint, which was after the first step
    found.emit(step(2))
    assert told["ftray_goodput", "g"] == pytest.approx(30 / 60)
    found.emit(step(3))
    assert told["ftray_goodput", "g"] == pytest.approx(40 / 60)
    assert told["ftray_step", "g"] == 4
    assert told["ftray_data_wait_share", "g"] == pytest.approx(0.05)
    assert told["ftray_padded_tokens_per_second", "g"] == pytest.approx(400)


def test_groups_that_start_again_are_counted_and_mfu_is_that_of_the_report(
    told: dict[tuple[str, ...], float],
) -> None:
    run = run_of()
    found = followed(TrainingMetrics(run))
    found.emit(TrainingStarted(0, 9, 2, "NVIDIA H200"))
    found.emit(step(0, tokens_per_s=30_000.0, grad_norm=None))
    assert told["ftray_mfu", "g"] == mfu(shape_of(run.model), run.method, CARDS["H200"], 2, 30_000)
    assert ("ftray_grad_norm", "g") not in told
    assert told["ftray_restarts", "g"] == 0
    found.emit(TrainingStarted(0, 9, 1, "NVIDIA H200"))
    assert (told["ftray_restarts", "g"], told["ftray_workers", "g"]) == (1, 1)


def test_what_nobody_knows_is_left_out(told: dict[tuple[str, ...], float]) -> None:
    found = followed(TrainingMetrics(run_of()))
    found.emit(TrainingStarted(0, 9, 2, "CPU"))
    found.emit(step(0, tokens_per_s=0.0))
    for event in (PhaseStarted("saving"), WorkersJoined(()), MemoryPlanned(1, 0, 2, 1.0), WeightsRewound(3, 2)):
        found.emit(event)
    assert {name for name, *_ in told}.isdisjoint({"ftray_mfu", "ftray_goodput"})


def test_a_trial_is_told_under_its_sweeps_name(told: dict[tuple[str, ...], float]) -> None:
    followed(TrainingMetrics(run_of(), name="sweep/trial-003")).emit(step(0))
    assert told["ftray_step", "sweep/trial-003"] == 1
    assert not any("g" in key[1:] for key in told)


def test_alerts_are_counted_by_kind(told: dict[tuple[str, ...], float]) -> None:
    found = followed(TrainingMetrics(run_of()))
    for kind in ("spike", "plateau", "spike"):
        found.emit(AlertRaised(kind, 3, "text"))
    assert told["ftray_alerts", "g", "spike"] == 2
    assert told["ftray_alerts", "g", "plateau"] == 1


def test_a_figure_that_can_not_be_told_ends_nothing_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Recorded):
        def set(self, value: float, tags: dict[str, str]) -> None:
            raise ValueError(f"{value} is none of {tags}")

    monkeypatch.setattr(ray_metrics, "Gauge", Broken)
    said: list[str] = []
    found = followed(TrainingMetrics(run_of(), warn=said.append))
    found.emit(step(0))
    found.emit(step(1))
    assert said == ["Could not export this run's metrics to Ray (ValueError: 1.0 is none of {'run': 'g'})"]
