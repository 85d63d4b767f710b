"""How long training stands still for a checkpoint, against saving the same bytes synchronously in the same run.

Full fine-tuning of the embedded 135M-parameter model on CPU: weights and both moments, 1.6 GB. Each time the checkpoint
is saved while training goes on, and then once more with training waiting for its commit.

    python -m bench.checkpoint_stall --workers 1 --stage 2 --saves 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ftray.model import embedded
from ftray.train.checkpoint.catalog import RunProgress
from ftray.train.checkpoint.writer import CheckpointWriter
from ftray.train.zero.state import local_bytes, local_parts
from tests import cluster, ranks


def measure(rank: int, workers: int, stage: int, saves: int, directory: str) -> list[dict[str, float]]:
    """For each checkpoint: seconds blocked, until committed while training, of a training step, and synchronous."""
    settings: dict[str, Any] = {
        "method__type": "full",
        "deepspeed__zero_stage": stage,
        "train__global_batch_size": workers,
        "scale__num_workers": workers,
    }
    run = cluster.make_run(Path(directory), Path(embedded.NAME), Path(directory), **settings)
    engine, parameters = ranks.build_engine(run)
    place = ranks.mesh()
    writer = CheckpointWriter(directory, 2, {}, False, place)
    writer.reserve(local_bytes(engine, parameters, place))
    step, found = 0, []

    def train() -> float:
        nonlocal step
        began_s = time.monotonic()
        ranks.train_steps(engine, step, step + 1)
        step += 1
        return time.monotonic() - began_s

    def save() -> None:
        writer.save(RunProgress(step=step, num_updates=step), local_parts(engine, parameters, place), [])

    train()
    writer.wait()
    for _ in range(saves):
        step_s = train()
        dist.barrier()
        began_s = time.monotonic()
        save()
        blocked_s = time.monotonic() - began_s
        while not writer.is_idle():
            train()
        writer.wait()
        committed_s = time.monotonic() - began_s
        train()
        dist.barrier()
        began_s = time.monotonic()
        save()
        writer.wait()
        synchronous_s = time.monotonic() - began_s
        dist.barrier()
        found.append({"blocked": blocked_s, "committed": committed_s, "step": step_s, "synchronous": synchronous_s})
    return found


def main() -> None:
    """Prints each checkpoint and the share of the slowest rank's blocked time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--saves", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ftray-stall-") as directory:
        found = ranks.run_ranks(asked.workers, measure, asked.workers, asked.stage, asked.saves, directory)
    shares = []
    for number in range(asked.saves):
        slowest = {key: max(rank[number][key] for rank in found) for key in found[0][0]}
        shares.append(slowest["blocked"] / slowest["synchronous"])
        figures = " · ".join(f"{key} {value:.3f} s" for key, value in slowest.items())
        print(f"checkpoint {number + 1}: {figures} · blocked {100 * shares[-1]:.1f}% of synchronous")
    print(f"blocked: median {100 * statistics.median(shares):.1f}%, most {100 * max(shares):.1f}% (wanted: at most 5%)")


if __name__ == "__main__":
    main()
