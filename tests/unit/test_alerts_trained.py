"""Alerts on a real model's curves: the tiny Llama, trained here on a language with a rule, well and badly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ftray.train.batch import collate
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import Sft
from ftray.train.step_timer import Stopwatch, slowest, timed
from tests import tiny
from tests.unit.test_alerts import alerts, kinds, line

RATE = 2e-3


def batches(number: int, seed: int) -> Iterator[Any]:
    """Rows of a language with a rule: each token is the one before it times three, plus one of two."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        ids = np.zeros((4, 48), np.int32)
        ids[:, 0] = rng.integers(3, 200, 4)
        for n in range(1, 48):
            ids[:, n] = (ids[:, n - 1] * 3 + rng.integers(0, 2, 4)) % 200 + 3
        positions = np.broadcast_to(np.arange(48), (4, 48)).astype(np.int32)
        yield collate(ids, ids, positions, np.full(4, 48, np.int32))


def trained(
    rate: float, num_steps: int, few: int = 0, every: int = 0, taught: int = 0, bad: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Lines of a real training by AdamW with warm-up and clipping. few: so many batches, again and again. taught: steps at
    RATE that the model learned before. bad: steps whose loss is no number."""
    torch.set_num_threads(1)
    loss_of = ObjectiveModel(tiny.make_model(), Sft()).train()
    optimizer = torch.optim.AdamW(loss_of.parameters(), lr=rate, weight_decay=0.0)
    data, held_out = list(batches(few or num_steps, 1)), list(batches(4, 2))
    before = list(batches(taught, 3))
    lines = []
    for n in range(-taught, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = (RATE if n < 0 else rate) * min(1.0, ((n + taught if n < 0 else n) + 1) / 5)
        batch = before[n] if n < 0 else data[n % len(data)]
        number = float((batch.labels >= 0).sum())
        loss = loss_of(batch)[0] / number * (float("nan") if n in bad else 1.0)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            optimizer.step()
        if n < 0:
            continue
        lines.append(line(n, float(loss.detach()), grad_norm=float(norm), **({} if is_finite else {"skipped": True})))
        if every and n % every == every - 1:
            with torch.no_grad():
                sums = [(float(loss_of(b)[0]), float((b.labels >= 0).sum())) for b in held_out]
            lines[-1]["eval_loss"] = sum(s for s, _ in sums) / sum(c for _, c in sums)
    return lines


def test_a_real_run_that_is_well_raises_none() -> None:
    lines = trained(RATE, 60, every=20, taught=40)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"], "it must learn"
    assert kinds(lines) == []


def test_a_real_run_with_a_hundred_times_the_rate_raises_its_alert_alone() -> None:
    lines = trained(100 * RATE, 60, every=20, taught=60)
    (alert,) = alerts(lines, learning_rate=100 * RATE)
    assert alert.kind == "learning rate too high"
    assert "at most a third of 0.2" in alert.text
    assert alert.step < 60, "while there is something to save"


def test_a_real_run_with_a_batch_that_is_no_number_raises_its_alert_alone() -> None:
    (alert,) = alerts(trained(RATE, 60, every=20, taught=40, bad=(30, 31)))
    assert (alert.kind, alert.step) == ("not finite", 30)


def test_a_real_run_on_very_little_data_raises_its_alert_alone() -> None:
    lines = trained(2.5 * RATE, 200, few=1, every=10, taught=60)
    (alert,) = alerts(lines)
    assert alert.kind == "overfitting"
    assert lines[-1]["loss"] < lines[10]["loss"], "by heart"


def test_a_step_tells_how_long_it_waited_for_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow() -> Iterator[Any]:
        for n in range(4):
            clock[0] += n
            yield n

    monkeypatch.setattr("ftray.train.step_timer.time", SimpleNamespace(monotonic=lambda: clock[0]))
    found = []
    for batch, wait_s in timed(slow()):
        clock[0] += 10  # the step itself
        found.append((batch, wait_s))
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_the_slowest_rank_is_told_by_how_much() -> None:
    assert slowest([1.0]) == {}
    assert slowest([1.0, 3.0, 1.0, 2.0]) == {"slowest_rank": 1, "slowest_by": 3.0}
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            torch.ones(10).sum()
    assert watch.take() > 0
    assert watch.take() == 0
