"""The training loop: one for full, LoRA and QLoRA. Runs in each Ray Train worker (`worker`).

Optimizer step t takes exactly the rows that the plan gives it; its loss is one mean over the supervised tokens of the
global batch. Only dropout is random, seeded from (seed, step, first sequence of the micro-batch). So a step depends on
weights, optimizer state and t alone, and that is what a checkpoint holds.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist

from ftray import config
from ftray.compat.deepspeed import deepspeed_without_compiler
from ftray.data.loader import RankBatch, RankLoader, to_batch
from ftray.data.packing import IGNORE_INDEX
from ftray.errors import ConfigError, RunError
from ftray.events.types import (
    CheckpointStarted,
    EvalFinished,
    Event,
    MemoryPlanned,
    MicroBatchChanged,
    PhaseStarted,
    StepFinished,
    TrainingEnded,
    TrainingStarted,
    WeightsRewound,
    payload,
)
from ftray.model.fp8 import FORMATS, check_device, use_eight_bits
from ftray.model.lora import build_model, trainable
from ftray.train.checkpoint.catalog import CheckpointRef, RunProgress, find_newest
from ftray.train.checkpoint.restore import parent_parts
from ftray.train.checkpoint.tensors import TensorPartReader
from ftray.train.checkpoint.writer import CheckpointWriter
from ftray.train.driver_channel import DriverLink
from ftray.train.job import TrainJob
from ftray.train.memory_tuning import fit_memory
from ftray.train.objectives.sft import MicroBatch, SummedLossModel, flatten_rows
from ftray.train.optim.adamw import AdamW
from ftray.train.optim.loss_scaler import prepare_scaling, read_scale, restore_scale, searches_scale
from ftray.train.optim.schedule import learning_rate
from ftray.train.packing_check import keep_apart
from ftray.train.step_timer import Stopwatch, slowest
from ftray.train.zero.config import deepspeed_config, owns_optimizer
from ftray.train.zero.init import gather_by_layers, partition_model
from ftray.train.zero.state import local_bytes, local_parts, restore_parts


class Trainer:
    """One rank's engine, data shard and progress."""

    _micro_before: int | None = None  # rows at once in the checkpoint that the run goes on from

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self._job, self._run = job, job.run
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._device = _device()
        shard = ray.train.get_dataset_shard("train")
        assert isinstance(shard, RankLoader)
        self._shard = shard
        found = self._newest()
        self._micro_before = found.progress.micro_batch_size if found else None
        self._engine, self._parameters = self._build_engine(shard.plan.most_documents)
        keep, is_small = self._run.checkpoint.keep, self._run.method.type != "full"
        self._writer = CheckpointWriter(job.run_dir, keep, job.meta, whole=is_small, lease=job.lease)
        self._progress = self._resume(found)
        self._writer.reserve(local_bytes(self._engine, self._parameters, self._rank, self._world_size))
        self._lines: list[dict[str, Any]] = []
        self._own_time = Stopwatch(self._device)
        self._saved_s = time.monotonic()
        self._link = DriverLink(job.monitor) if self._rank == 0 else None

    def train(self) -> None:
        """Runs the steps; every rank leaves at the same one."""
        if not self._progress.finished:
            self._emit(
                TrainingStarted(self._progress.step, self._shard.plan.num_steps, self._world_size, self._device_name())
            )
            fit = self._fit
            if fit.peak is not None:
                self._emit(MemoryPlanned(fit.micro_batch_size, fit.layers, fit.num_layers, fit.peak))
            if self._micro_before is not None and self._micro_before != fit.micro_batch_size:
                self._emit(MicroBatchChanged(fit.micro_batch_size, self._micro_before))
            for batch, wait_s in _timed(self._shard.batches(self._progress.step)):
                num_supervised, stop = self._agree(batch)
                if stop:
                    break
                self._step(batch, num_supervised, wait_s)
                if self._after_step():
                    break
            if self._lines:  # stopped between two checkpoints
                self._save()
        self._busy("saving")
        self._writer.wait()
        self._emit(TrainingEnded(self._progress.step, self._progress.finished), last=True)

    def _device_name(self) -> str:
        return "CPU" if self._device.type == "cpu" else torch.cuda.get_device_name(self._device)

    def _build_engine(self, most_documents: int = 1) -> tuple[Any, dict[str, torch.nn.Parameter]]:
        """most_documents: in a row."""
        deepspeed_without_compiler()
        import deepspeed

        train = self._run.train
        if self._device.type == "cpu":
            torch.set_num_threads(max(1, int(self._run.scale.cpus_per_worker)))
        model = self._build_model()
        parameters = trainable(model.model)
        keep_apart(self._run, model, self._device)
        self._fit = fit_memory(self._run, model, self._device, self._world_size, self._micro_before, most_documents)
        micro_batch_size = self._fit.micro_batch_size
        self._run = self._run.model_copy(
            update={"train": train.model_copy(update={"micro_batch_size": micro_batch_size})}
        )
        optimizer = _optimizer(list(parameters.values()), self._run, self._device)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(train, self._run.deepspeed, micro_batch_size, self._world_size),
            dist_init_required=False,
        )
        if hasattr(engine.optimizer, "check_grad_overflow"):
            engine.optimizer.check_grad_overflow = True  # in fp32 too: nothing non-finite may reach the weights
        prepare_scaling(engine)
        return engine, parameters

    def _build_model(self) -> SummedLossModel:
        """On this rank's device; under ZeRO-3 its parts of all weights, whose whole no device ever holds."""
        run, train = self._run, self._run.train
        is_cut = run.deepspeed.zero_stage == 3
        outline = is_cut and dist.get_rank() > 0
        tuned = build_model(run.model, run.method, train.precision, train.seed, outline)
        if run.method.base_precision is not None:
            check_device(FORMATS[run.method.base_precision], self._device)
            if not use_eight_bits(tuned, run.method, self._device):
                more = "" if run.method.type == "full" else "add such layers to method.target_modules, or "
                raise ConfigError(
                    f"method.base_precision {run.method.base_precision}: no feed-forward layer of this model that is "
                    f"trained can be computed in 8 bits; {more}leave base_precision out"
                )
        model = SummedLossModel(tuned, train.label_smoothing).train()
        if not is_cut:
            return model.to(self._device)
        partition_model(model, deepspeed_config(train, run.deepspeed, 1, self._world_size), self._device)
        gather_by_layers(model.decoder)
        return model

    def _resume(self, found: CheckpointRef | None) -> RunProgress:
        if found is None:
            if self._job.parent is not None:
                self._put_back(parent_parts(self._job.parent, self._parameters), 0)
            return RunProgress()
        progress = found.progress
        self._put_back(TensorPartReader(found.uri), progress.num_updates)
        restore_scale(self._engine, progress.loss_scale)
        expected = self._shard.plan.position(progress.step)
        if progress.position != expected:
            raise RunError(
                f"checkpoint {found.uri} stands at {progress.position} in the data, the plan at {expected}; the data changed"
            )
        return progress

    def _put_back(self, reader: TensorPartReader, num_updates: int) -> None:
        where = (self._rank, self._world_size)
        restore_parts(self._engine, self._parameters, reader.read_many, num_updates, *where)

    def _newest(self, below_updates: float = math.inf) -> CheckpointRef | None:
        # Rank 0 looks, so that all ranks take the same checkpoint whatever storage shows each of them.
        chosen: list[CheckpointRef | None] = [None]
        if self._rank == 0:
            warn = partial(print, "warning:", flush=True)
            chosen[0] = find_newest(self._job.run_dir, warn, below_updates)
        dist.broadcast_object_list(chosen, src=0)
        return chosen[0]

    def _rewind(self) -> None:
        """Weights and optimizer of the last checkpoint with other weights; the rows since then stay behind."""
        self._busy("loading")
        self._writer.wait()
        found = self._newest(below_updates=self._progress.num_updates)
        if found is None:
            raise RunError(
                f"step {self._progress.step - 1}: {self._progress.bad_in_row} steps in a row had a non-finite loss or "
                "gradient, and there is no checkpoint to go back to; lower train.learning_rate or look at the data"
            )
        self._put_back(TensorPartReader(found.uri), found.progress.num_updates)
        self._progress.num_updates, self._progress.bad_in_row = found.progress.num_updates, 0
        self._lines[-1]["rewound_to"] = found.step
        self._emit(WeightsRewound(self._progress.step, found.step))

    def _agree(self, batch: RankBatch) -> tuple[float, bool]:
        """Supervised tokens of the global batch, and whether to stop before this step: one sum over all ranks."""
        stop = self._link is not None and self._link.stop_asked()
        mine = float((batch.labels >= 0).sum())
        total = self._sum([mine, float(stop)])
        return total[0], total[1] > 0

    def _sum(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor]

    def _step(self, batch: RankBatch, num_supervised: float, wait_s: float) -> None:
        """One optimizer step: accumulates micro-batches, then updates the weights unless something is non-finite."""
        began_s = time.monotonic()
        rate = learning_rate(batch.step, self._shard.plan.num_steps, *_schedule(self._run.train))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        scale = read_scale(self._engine)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)  # summed there: reading it would wait
        for first_sequence, micro in _micro_batches(batch, self._run.micro_batch_size, self._device):
            torch.manual_seed(_dropout_seed(self._run.train.seed, batch.step, first_sequence))
            with self._own_time:
                loss = self._engine(*vars(micro).values())
            loss_sum += loss.detach()
            # DeepSpeed averages gradients over ranks; this factor makes it one mean over the global batch's tokens.
            # An infinite loss may have finite gradients: they become NaN, so that no rank takes the step.
            factor = self._world_size / max(1.0, num_supervised) + 0.0 * loss.detach()
            self._engine.backward(loss * factor, scale_wrt_gas=False)
            self._engine.step()
        told = [float(loss_sum), float(batch.num_tokens.sum()), rows_sum(batch.sequence_ids)]
        own_s = [0.0] * self._world_size
        own_s[self._rank] = self._own_time.take()
        sums = self._sum([*told, *own_s])
        norm = self._engine.get_global_grad_norm()
        applied = math.isfinite(sums[0]) and not getattr(self._engine.optimizer, "overflow", False)
        progress = self._progress
        progress.step = batch.step + 1
        progress.num_updates += applied
        is_bad = not (applied or (math.isfinite(sums[0]) and searches_scale(self._engine, scale)))
        progress.num_bad_steps += is_bad
        progress.bad_in_row = progress.bad_in_row + 1 if is_bad else 0
        duration_s = time.monotonic() - began_s + wait_s
        event = StepFinished(
            batch.step,
            loss=sums[0] / max(1.0, num_supervised),
            num_tokens=int(sums[1]),
            num_trained_tokens=int(num_supervised),
            sequences=f"{int(sums[2]):x}",
            learning_rate=rate,
            grad_norm=float(norm) if norm is not None else None,
            tokens_per_s=round(sums[1] / duration_s, 1),
            data_wait_s=round(wait_s, 4),
            unix_s=round(time.time(), 3),
            **slowest(sums[len(told) :]),
            skipped=None if applied else True,
            loss_scale=scale["cur_scale"] if scale is not None else None,
            peak_memory_gib=(
                round(torch.cuda.max_memory_allocated() / 2**30, 2) if self._device.type == "cuda" else None
            ),
        )
        self._lines.append(payload(event))
        self._emit(event)
        if progress.num_bad_steps > self._run.train.max_bad_steps:
            raise RunError(
                f"step {batch.step}: {progress.num_bad_steps} steps had a non-finite loss or gradient, allowed are "
                f"train.max_bad_steps ({self._run.train.max_bad_steps}); lower train.learning_rate or look at the data"
            )

    def _after_step(self) -> bool:
        """Held-out loss and checkpoint where they are due; True when the run is finished."""
        step, evaluate, progress = self._progress.step, self._run.evaluate, self._progress
        if progress.bad_in_row == self._run.train.rewind_after:
            self._rewind()
        evaluates = evaluate.every and self._job.heldout is not None and step % evaluate.every == 0
        is_best = self._evaluate() if evaluates else False
        out_of_patience = evaluate.early_stopping is not None and progress.since_best >= evaluate.early_stopping
        progress.finished = out_of_patience or step == self._shard.plan.num_steps
        if is_best or progress.finished or self._checkpoint_due():
            self._save()
        return progress.finished

    def _checkpoint_due(self) -> bool:
        """By steps or epochs a function of the step; by time rank 0's clock decides for all."""
        section, plan, step = self._run.checkpoint, self._shard.plan, self._progress.step
        if isinstance(section.every, int):
            return step % section.every == 0
        if section.every_epochs is not None:
            rows = section.every_epochs * plan.mixture.sequences_per_epoch
            size = plan.global_batch_size
            return int(step * size // rows) > int((step - 1) * size // rows)
        due = self._rank == 0 and time.monotonic() - self._saved_s >= (section.every_s or 0)
        return self._sum([float(due)])[0] > 0

    def _evaluate(self) -> bool:
        """Held-out loss over all ranks; True when it is the best so far."""
        self._busy("evaluating")
        table: pa.Table = ray.get(self._job.heldout)
        mine = heldout_share(table, self._rank, self._world_size)
        loss_sum, count = batch_sums(self._engine, mine, self._run.micro_batch_size, self._device)
        self._engine.train()
        sums = self._sum([loss_sum, count])
        loss, progress = sums[0] / sums[1], self._progress
        is_best = progress.note_heldout(loss)
        self._lines[-1]["eval_loss"] = loss
        self._emit(EvalFinished(progress.step, loss))
        if self._job.waits and self._link is not None:
            self._link.await_verdict(progress.step)
        return is_best

    def _save(self) -> None:
        self._busy("saving")
        self._progress.position = self._shard.plan.position(self._progress.step)
        self._progress.loss_scale = read_scale(self._engine)
        self._progress.micro_batch_size = self._fit.micro_batch_size
        parts = local_parts(self._engine, self._parameters, self._rank, self._world_size)
        self._writer.save(self._progress, parts, self._lines)
        self._emit(CheckpointStarted(self._progress.step))
        self._lines = []
        self._saved_s = time.monotonic()

    def _busy(self, phase: str) -> None:
        self._emit(PhaseStarted(phase))

    def _emit(self, event: Event, last: bool = False) -> None:
        if self._link is not None:
            self._link.send(event, last)


def heldout_sums(model: Any, table: pa.Table, micro_batch_size: int, device: torch.device) -> tuple[float, float]:
    """(summed loss, supervised tokens) over held-out rows. model: SummedLoss, or an engine of one; left in eval mode."""
    return batch_sums(model, to_batch(table), micro_batch_size, device)


def heldout_share(table: pa.Table, rank: int, world_size: int) -> RankBatch:
    """Held-out rows of a rank, as many on each: ranks that hold shards of the weights gather them together.

    Where rows don't divide evenly, some ranks end with a row whose tokens are all unsupervised: it counts nothing.
    """
    each = -(-table.num_rows // world_size)
    rows = range(rank, each * world_size, world_size)
    batch = to_batch(table.take(pa.array([row % table.num_rows for row in rows], pa.int64())))
    labels = batch.labels.copy()
    labels[[row >= table.num_rows for row in rows]] = IGNORE_INDEX
    return replace(batch, labels=labels)


def batch_sums(model: Any, batch: RankBatch, micro_batch_size: int, device: torch.device) -> tuple[float, float]:
    """As `heldout_sums`, of rows that are numpy arrays already."""
    model.eval()
    loss_sum, count = 0.0, 0.0
    with torch.no_grad():
        for _, micro in _micro_batches(batch, micro_batch_size, device):
            loss_sum += float(model(*vars(micro).values()))
            count += float((micro.labels >= 0).sum())
    return loss_sum, count


def _micro_batches(batch: RankBatch, size: int, device: torch.device) -> Iterator[tuple[int, MicroBatch]]:
    for lo in range(0, len(batch.input_ids), size):
        part = slice(lo, lo + size)
        arrays = (batch.input_ids[part], batch.labels[part], batch.position_ids[part], batch.num_tokens[part])
        yield batch.first_sequence + lo, flatten_rows(*arrays, device=device)


def rows_sum(sequence_ids: list[tuple[int, int, int, int]]) -> float:
    """A sum over rows that tells sets of rows apart, whatever rank holds which: 40 bits each, exact in float64."""
    return float(
        sum(int.from_bytes(hashlib.blake2b(repr(r).encode(), digest_size=5).digest(), "big") for r in sequence_ids)
    )


def _timed(batches: Iterator[RankBatch]) -> Iterator[tuple[RankBatch, float]]:
    while True:
        began_s = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - began_s


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # micro-batches differ in length
    return torch.device("cuda", torch.cuda.current_device())


def _optimizer(
    parameters: list[torch.nn.Parameter], run: config.RunConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Ours at stage 0; under ZeRO torch's, which DeepSpeed hands its shards of fp32 masters."""
    train = run.train
    if owns_optimizer(train, run.deepspeed):
        return AdamW(parameters, train.learning_rate, train.weight_decay, train.max_grad_norm, train.optimizer)
    fused = device.type == "cuda"
    # Each step sets its own rate; DeepSpeed may make an empty step before the first.
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=train.weight_decay, fused=fused)


def _schedule(train: config.TrainConfig) -> tuple[float, float, str]:
    return train.learning_rate, train.warmup, train.schedule


def _dropout_seed(seed: int, step: int, first_sequence: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{first_sequence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
