"""Training ranks without Ray: processes of this machine joined by gloo (on GPUs NCCL, too), each with the Trainer's engine."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ftray import config
from ftray.data.packing import pack_examples
from ftray.train.batch import Batch, collate
from ftray.train.checkpoint.tensors import SplitFp32, TensorPart
from ftray.train.parallel import DeviceMesh
from ftray.train.zero import engine as zero_engine
from tests import tiny

# At stage 3 DeepSpeed keeps small weights whole on every rank, and in a tiny model all are small: not with this.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}

# The fork server imports them once; otherwise each rank spends about seven CPU seconds on it.
PRELOADED = ["deepspeed", "peft", "ftray.train.trainer", "tests.tiny"]


def run_ranks(world_size: int, act: Callable[..., Any], *args: Any) -> list[Any]:
    """What `act(rank, *args)` returns on each rank. `act` is a function of a module; what it returns is saved by torch."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        rank_args = (world_size, port, scratch, dict(os.environ), act, args)
        mp.start_processes(_enter, rank_args, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(scratch, str(r)), weights_only=False) for r in range(world_size)]


def _enter(
    rank: int,
    world_size: int,
    port: int,
    scratch: str,
    environment: dict[str, str],
    act: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # of the fork server, which may have started many tests ago
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DEEPSPEED_LOG_LEVEL": "error"}
    torch.set_num_threads(1)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    try:
        torch.save(act(rank, *args), Path(scratch, str(rank)))
    finally:
        dist.destroy_process_group()


def build_engine(run: config.RunConfig) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """DeepSpeed engine and trainable parameters of this rank."""
    engine = zero_engine.build_engine(run, mesh())
    return engine.deepspeed, engine.parameters


def mesh() -> DeviceMesh:
    """This rank's place, on the CPU."""
    return DeviceMesh(dist.get_rank(), dist.get_world_size())


def tiny_batch(step: int, rank: int) -> Batch:
    """One packed row of 64 random tokens, another for each step and rank."""
    rng = np.random.default_rng((step, rank))
    documents = [(rng.integers(3, tiny.VOCAB_SIZE, n).tolist(), [True] * n) for n in (20, 30, 11)]
    (row,) = pack_examples(documents, 64, 1)
    return collate(row.input_ids[None], row.labels[None], row.position_ids[None], np.array([row.num_tokens]))


def train_steps(engine: Any, first: int, end: int) -> list[float]:
    """Optimizer steps over `tiny_batch`; the summed loss of each on this rank."""
    losses = []
    for step in range(first, end):
        batch = tiny_batch(step, dist.get_rank())
        loss = engine(batch)[0]
        losses.append(float(loss.detach()))
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        engine.backward(loss / 60, scale_wrt_gas=False)
        engine.step()
    return losses


def lift_fp16_gate() -> None:
    """DeepSpeed refuses fp16 on CPUs that are slow at it; torch computes it all the same."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def values(parts: list[TensorPart]) -> list[torch.Tensor]:
    """Copies of what parts hold."""
    return [part.values.whole() if isinstance(part.values, SplitFp32) else part.values.clone() for part in parts]
