"""The training loop: one for every method, objective and model family.

Optimizer step t consumes exactly the packed sequences that the plan gives it; its loss is one mean over the global batch. Only
dropout is random, seeded by (seed, step, first sequence of the micro-batch). So a step depends on weights, optimizer state and
t alone, which is what a checkpoint holds.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ftray import config
from ftray.data.loader import RankBatch, RankLoader
from ftray.errors import RunError
from ftray.events.types import (
    CheckpointStarted,
    EvalFinished,
    MemoryPlanned,
    MicroBatchChanged,
    PhaseStarted,
    StepFinished,
    TrainingEnded,
    TrainingStarted,
    WeightsRewound,
    payload,
)
from ftray.train.bad_steps import BadStepPolicy
from ftray.train.batch import dropout_seed, micro_batches, sequence_hash
from ftray.train.checkpoint.catalog import RunProgress
from ftray.train.checkpoint.restore import newest_on_all_ranks
from ftray.train.checkpoint.tensors import TensorPartReader
from ftray.train.checkpoint.writer import CheckpointSchedule, CheckpointWriter
from ftray.train.driver_channel import DriverLink
from ftray.train.eval_loss import Evaluator
from ftray.train.optim.loss_scaler import lowered_scale, read_scale
from ftray.train.optim.schedule import learning_rate
from ftray.train.parallel import DeviceMesh
from ftray.train.step_timer import StragglerTimer, slowest, timed
from ftray.train.zero.engine import ZeroEngine


@dataclass
class Trainer:
    """One rank's training loop; `setup.build_trainer` makes its collaborators.

    Attributes:
        run_dir: The run's directory.
        settings: The section `train`.
        mesh: This rank's place.
        loader: This rank's batches.
        engine: Model, optimizer and memory settings.
        writer: Commits checkpoints.
        schedule: When checkpoints are due.
        evaluator: Computes the eval loss.
        bad_steps: Policy for non-finite losses and gradients.
        timer: Times this rank's forward passes.
        link: Channel to the driver.
        progress: Where the run stands.
        micro_batch_before: Micro-batch size of the checkpoint that the run continues from.
        waits: Whether to pause after each eval for the driver's stop/continue decision.
        metrics: Lines of metrics since the last checkpoint.
    """

    run_dir: str
    settings: config.TrainConfig
    mesh: DeviceMesh
    loader: RankLoader
    engine: ZeroEngine
    writer: CheckpointWriter
    schedule: CheckpointSchedule
    evaluator: Evaluator
    bad_steps: BadStepPolicy
    timer: StragglerTimer
    link: DriverLink
    progress: RunProgress
    micro_batch_before: int | None = None
    waits: bool = False
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def train(self) -> None:
        """Runs the steps; all ranks stop after the same step."""
        if not self.progress.finished:
            self._announce()
            for batch, wait_s in timed(self.loader.batches(self.progress.step)):
                weight, stop = self._agree(batch)
                if stop:
                    break
                self.step(batch, weight, wait_s)
                if self._after_step():
                    break
            if self.metrics:  # stopped between two checkpoints
                self._save()
        self.link.send(PhaseStarted("saving"))
        self.writer.wait()
        self.link.send(TrainingEnded(self.progress.step, self.progress.finished), last=True)

    def _announce(self) -> None:
        memory, plan = self.engine.memory, self.loader.plan
        self.link.send(TrainingStarted(self.progress.step, plan.num_steps, self.mesh.world_size, self.mesh.device_name))
        if memory.peak is not None:
            self.link.send(MemoryPlanned(memory.micro_batch_size, memory.layers, memory.num_layers, memory.peak))
        if self.micro_batch_before is not None and self.micro_batch_before != memory.micro_batch_size:
            self.link.send(MicroBatchChanged(memory.micro_batch_size, self.micro_batch_before))

    def _agree(self, batch: RankBatch) -> tuple[float, bool]:
        """The weight of the global batch, and whether to stop before this step: one sum over all ranks."""
        weight = self.engine.objective.weight(batch)
        total, stops = self.mesh.sum([weight, float(self.link.stop_requested())])
        return total, stops > 0

    def step(self, batch: RankBatch, weight: float, wait_s: float) -> None:
        """One optimizer step: accumulates micro-batches, then updates the weights unless something is not finite.

        Args:
            batch: This rank's packed sequences.
            weight: Weight of the global batch: its trained tokens.
            wait_s: Seconds that this rank waited for the batch.

        Raises:
            RunError: More steps were bad than allowed.
        """
        engine, device, started_s = self.engine.deepspeed, self.mesh.device, time.monotonic()
        settings, progress = self.settings, self.progress
        rate = learning_rate(
            batch.step, self.loader.plan.num_steps, settings.learning_rate, settings.warmup, settings.schedule
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        scale = read_scale(engine)

        loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # reading a loss would wait for the GPU
        for first_sequence, micro in micro_batches(batch, self.engine.memory.micro_batch_size, device):
            torch.manual_seed(dropout_seed(settings.seed, batch.step, first_sequence))
            with self.timer:
                loss, _ = engine(micro)
            loss_sum += loss.detach()
            # DeepSpeed averages gradients over data ranks; this factor makes it one mean over the global batch.
            # An infinite loss may have finite gradients: they become NaN, so that no rank takes the step.
            factor = self.mesh.data_size / max(1.0, weight) + 0.0 * loss.detach()
            engine.backward(loss * factor, scale_wrt_gas=False)
            engine.step()

        values = [float(loss_sum), float(batch.num_tokens.sum()), sequence_hash(batch.sequence_ids)]
        sums = self.mesh.sum([*values, *self.timer.take_all()])
        updated = math.isfinite(sums[0]) and not getattr(engine.optimizer, "overflow", False)
        progress.step = batch.step + 1
        self.bad_steps.count(progress, sums[0], updated, lowered_scale(engine, scale))

        norm = engine.get_global_grad_norm()
        event = StepFinished(
            batch.step,
            loss=sums[0] / max(1.0, weight),
            num_tokens=int(sums[1]),
            num_trained_tokens=int(weight),
            sequences=f"{int(sums[2]):x}",
            learning_rate=rate,
            grad_norm=float(norm) if norm is not None else None,
            tokens_per_s=round(sums[1] / (time.monotonic() - started_s + wait_s), 1),
            data_wait_s=round(wait_s, 4),
            unix_s=round(time.time(), 3),
            **slowest(sums[len(values) :]),
            skipped=None if updated else True,
            loss_scale=scale["cur_scale"] if scale is not None else None,
            peak_memory_gib=self.mesh.peak_memory_gib(),
        )
        self.metrics.append(payload(event))
        self.link.send(event)
        self.bad_steps.check(progress)

    def _after_step(self) -> bool:
        """Rewind, eval and checkpoint where they are due; True when the run is finished."""
        progress = self.progress
        if self.bad_steps.rewinds(progress):
            self._rewind()
        is_best = self._evaluate() if self.evaluator.is_due(progress.step) else False
        out_of_patience = self.evaluator.is_out_of_patience(progress.since_best)
        progress.finished = out_of_patience or progress.step == self.loader.plan.num_steps
        if is_best or progress.finished or self.schedule.is_due(progress.step):
            self._save()
        return progress.finished

    def _rewind(self) -> None:
        """Restores weights and optimizer from the last checkpoint with other weights; the data continues from here."""
        self.link.send(PhaseStarted("loading"))
        self.writer.wait()
        progress = self.progress
        checkpoint = newest_on_all_ranks(self.run_dir, self.mesh, below_updates=progress.num_updates)
        if checkpoint is None:
            raise RunError(
                f"step {progress.step - 1}: {progress.bad_in_row} steps in a row had a non-finite loss or gradient, and there "
                "is no checkpoint to restore. Lower train.learning_rate or check the data"
            )
        self.engine.restore(TensorPartReader(checkpoint.uri), checkpoint.progress.num_updates)
        progress.num_updates, progress.bad_in_row = checkpoint.progress.num_updates, 0
        self.metrics[-1]["rewound_to"] = checkpoint.step
        self.link.send(WeightsRewound(progress.step, checkpoint.step))

    def _evaluate(self) -> bool:
        """Computes the eval loss; True when it is the best so far."""
        self.link.send(PhaseStarted("evaluating"))
        loss = self.evaluator.loss(self.engine.deepspeed)
        is_best = self.progress.note_eval(loss)
        self.metrics[-1]["eval_loss"] = loss
        self.link.send(EvalFinished(self.progress.step, loss))
        if self.waits:
            self.link.await_verdict(self.progress.step)
        return is_best

    def _save(self) -> None:
        self.link.send(PhaseStarted("saving"))
        progress = self.progress
        progress.position = self.loader.plan.position(progress.step)
        progress.loss_scale = read_scale(self.engine.deepspeed)
        progress.micro_batch_size = self.engine.memory.micro_batch_size
        self.writer.save(progress, self.engine.parts(), self.metrics)
        self.link.send(CheckpointStarted(progress.step))
        self.metrics = []
        self.schedule.saved()
