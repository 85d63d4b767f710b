"""Builds a worker's trainer: mesh, engine, resumed state, checkpoint writer."""

from __future__ import annotations

import ray.train
import torch

from ftray.compat.torch import use_expandable_segments
from ftray.data.loader import RankLoader
from ftray.errors import RunError
from ftray.train.bad_steps import BadStepPolicy
from ftray.train.checkpoint.catalog import CheckpointRef, RunProgress
from ftray.train.checkpoint.restore import newest_on_all_ranks, parent_parts
from ftray.train.checkpoint.tensors import TensorPartReader
from ftray.train.checkpoint.writer import CheckpointSchedule, CheckpointWriter
from ftray.train.driver_channel import DriverLink, TrainJob
from ftray.train.eval_loss import Evaluator
from ftray.train.optim.loss_scaler import restore_scale
from ftray.train.parallel import DeviceMesh
from ftray.train.step_timer import StragglerTimer
from ftray.train.trainer import Trainer
from ftray.train.zero.engine import ZeroEngine, build_engine


def build_trainer(job: TrainJob) -> Trainer:
    """The trainer of this Ray Train worker, at the newest sound checkpoint. Collective.

    Raises:
        ConfigError, ModelError: As `build_engine`.
        CheckpointError, RunError: The checkpoint does not fit.
    """
    run, loader = job.run, ray.train.get_dataset_shard("train")
    assert isinstance(loader, RankLoader)
    mesh = DeviceMesh.from_config(run.scale, choose_device())
    checkpoint = newest_on_all_ranks(job.run_dir, mesh)
    micro_batch_before = checkpoint.progress.micro_batch_size if checkpoint else None
    engine = build_engine(run, mesh, micro_batch_before, loader.plan.most_documents)
    is_small = run.method.type != "full"
    writer = CheckpointWriter(job.run_dir, run.checkpoint.keep, job.meta, is_small, mesh, job.lease)
    progress = _resume(job, engine, loader, checkpoint)
    writer.reserve(engine.num_bytes())
    return Trainer(
        run_dir=job.run_dir,
        settings=run.train,
        mesh=mesh,
        loader=loader,
        engine=engine,
        writer=writer,
        schedule=CheckpointSchedule(run.checkpoint, loader.plan, mesh),
        evaluator=Evaluator(run.evaluate, job.eval_table, mesh, engine.memory.micro_batch_size),
        bad_steps=BadStepPolicy.from_config(run.train),
        timer=StragglerTimer(mesh),
        link=DriverLink(job.channel if mesh.is_first else None),
        progress=progress,
        micro_batch_before=micro_batch_before,
        waits=job.waits,
    )


def choose_device() -> torch.device:
    """This worker's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    use_expandable_segments()
    return torch.device("cuda", torch.cuda.current_device())


def _resume(job: TrainJob, engine: ZeroEngine, loader: RankLoader, checkpoint: CheckpointRef | None) -> RunProgress:
    """Restores the training state from the checkpoint, or the weights from the run's parent."""
    if checkpoint is None:
        if job.parent is not None:
            engine.restore(parent_parts(job.parent, engine.parameters), 0)
        return RunProgress()
    progress = checkpoint.progress
    engine.restore(TensorPartReader(checkpoint.uri), progress.num_updates)
    restore_scale(engine.deepspeed, progress.loss_scale)
    expected = loader.plan.position(progress.step)
    if progress.position != expected:
        raise RunError(
            f"checkpoint {checkpoint.uri} is at data position {progress.position}, the plan at {expected}: the data changed"
        )
    return progress
