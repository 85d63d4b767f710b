"""What is not finite: a step whose loss is infinite changes nothing on any rank, and a held-out loss of NaN is never the best.

No Ray: two processes with the Trainer's own engine and step.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftray.data.loader import RankBatch
from ftray.data.packing import pack_examples
from ftray.errors import RunError
from ftray.train.bad_steps import BadStepPolicy
from ftray.train.checkpoint.catalog import RunProgress
from ftray.train.checkpoint.writer import CheckpointSchedule, CheckpointWriter
from ftray.train.driver_channel import DriverLink
from ftray.train.eval_loss import Evaluator
from ftray.train.step_timer import StragglerTimer
from ftray.train.trainer import Trainer
from ftray.train.zero.engine import build_engine
from tests import cluster, ranks, tiny

CASES: dict[str, dict[str, Any]] = {
    "full-0": {"deepspeed__zero_stage": 0, "train__precision": "bf16", "method__type": "full"},
    "lora-2": {"deepspeed__zero_stage": 2},
    "full-3": {"deepspeed__zero_stage": 3, "method__type": "full", "deepspeed__overrides": ranks.SHARD_ALL},
}
FORGIVEN = 2  # max_bad_steps


class Plan:
    """As much of a plan as a step asks for."""

    num_steps = 100


class Loader:
    plan = Plan


def trainer_of(run: Any, rank: int) -> Trainer:
    """A Trainer without Ray."""
    mesh, plan = ranks.mesh(), Plan()
    assert mesh.rank == rank
    engine = build_engine(run, mesh)
    return Trainer(
        run_dir="",
        settings=run.train,
        mesh=mesh,
        loader=Loader(),  # type: ignore[arg-type]
        engine=engine,
        writer=CheckpointWriter("", 1, {}, True, mesh),
        schedule=CheckpointSchedule(run.checkpoint, plan, mesh),  # type: ignore[arg-type]
        evaluator=Evaluator(run.evaluate, None, mesh, 1),
        bad_steps=BadStepPolicy.from_config(run.train),
        timer=StragglerTimer(mesh),
        link=DriverLink(None),
        progress=RunProgress(),
    )


def batch_of(step: int, rank: int) -> RankBatch:
    rng = np.random.default_rng((step, rank))
    (row,) = pack_examples([(rng.integers(3, tiny.VOCAB_SIZE, 50).tolist(), [True] * 50)], 64, 1)
    arrays = (np.asarray(one)[None] for one in (row.input_ids, row.labels, row.position_ids))
    return RankBatch(step, 2 * step + rank, *arrays, np.array([row.num_tokens]), [(0, 0, step, rank)])


def take_steps(rank: int, root: Path) -> dict[str, Any]:
    """A good step, one whose loss is infinite on rank 1 with gradients that are finite, a good one; then bad ones only."""
    found = {}
    for name, settings in CASES.items():
        sizes = {"train__global_batch_size": 2, "train__micro_batch_size": 1, "train__max_bad_steps": FORGIVEN}
        run = cluster.make_run(root, root / "model", root, **{**sizes, **settings})
        trainer = trainer_of(run, rank)
        bad: set[int] = {1, *range(3, 9)} if rank == 1 else set()
        step = 0

        def spoil(_module: Any, _inputs: Any, result: Any, bad: set[int] = bad) -> Any:
            loss, weight = result
            return (loss + math.inf if step in bad else loss), weight  # noqa: B023 - this loop's

        trainer.engine.deepspeed.module.register_forward_hook(spoil)
        told = []
        try:
            for step in range(9):
                before = ranks.values(trainer.engine.parts())
                trainer.step(batch_of(step, rank), 2 * 49, 0.0)
                after = ranks.values(trainer.engine.parts())
                # The first step brings moments to be.
                moved = len(before) != len(after) or not all(map(torch.equal, before, after))
                finite = all(bool(one.float().isfinite().all()) for one in after)
                told.append((math.isfinite(trainer.metrics[-1]["loss"]), moved, finite))
        except RunError as err:
            ended = str(err)
        progress = trainer.progress
        found[name] = (
            told,
            (progress.num_updates, progress.num_bad_steps, progress.bad_in_row),
            ended,
            trainer.metrics,
        )
        trainer.engine.deepspeed.destroy()
    return found


def test_a_step_with_an_infinite_loss_and_finite_gradients_is_left_out_on_all_ranks_and_counted(tmp_path: Path) -> None:
    tiny.write_tiny_model(tmp_path / "model")
    for one in ranks.run_ranks(2, take_steps, tmp_path):
        for name, (told, counts, ended, lines) in one.items():
            good, bad = (True, True, True), (False, False, True)
            assert told == [good, bad, good, bad], name
            assert counts == (2, FORGIVEN + 1, 2), f"{name}: updates, bad steps, of them in a row"
            assert [bool(line.get("skipped")) for line in lines] == [False, True, False, True, True], name
            assert (
                f"step 4: {FORGIVEN + 1} steps had a non-finite loss or gradient. The limit train.max_bad_steps is"
                in ended
            ), name


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf])
def test_an_eval_loss_that_is_not_finite_is_never_the_best_and_counts_against_patience(nothing: float) -> None:
    progress, seen = RunProgress(), []
    for step, loss in enumerate([nothing, 3.0, nothing, 2.0, nothing, 2.5, 2.0, nothing], 1):
        progress.step = step
        seen.append((progress.note_eval(loss), progress.since_best))
    assert seen == [(False, 1), (True, 0), (False, 1), (True, 0), (False, 1), (False, 2), (False, 3), (False, 4)]
    assert progress.best == {"step": 4, "loss": 2.0}


def test_eval_losses_that_are_not_finite_runs_out_of_patience_without_a_best() -> None:
    progress = RunProgress()
    assert [progress.note_eval(math.nan) for _ in range(3)] == [False] * 3
    assert (progress.best, progress.since_best) == (None, 3)
