"""The step without Ray, DeepSpeed or data: the same model, loss and optimizer in a loop, as a ceiling.

    python -m bench.plain_loop --model .bench/model-8b --rows 4 --steps 10

`--rows auto` and `--recompute auto` choose as a run does; the line tells what was expected and what it took.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftray import config
from ftray.compat.torch import use_expandable_segments
from ftray.model.fp8 import use_eight_bits
from ftray.model.lora import build_model, trainable
from ftray.train.batch import Batch, collate
from ftray.train.memory import EIGHT_BIT, PAGED
from ftray.train.memory_tuning import tune_memory
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import Sft
from ftray.train.optim.adamw import FULL, AdamW
from ftray.train.parallel import DeviceMesh

OPTIMIZERS = (FULL, EIGHT_BIT, FULL + PAGED, EIGHT_BIT + PAGED)


def run_of(given: Any) -> config.RunConfig:
    """The settings as a run's."""
    rows = given.rows if given.rows == "auto" else int(given.rows)
    train = {"global_batch_size": given.batch or given.accumulate * int(rows), "micro_batch_size": rows}
    train |= {"optimizer": given.optimizer, "gradient_checkpointing": given.recompute, "learning_rate": 1e-4}
    tree = {"name": "plain", "model": {"base": given.model}, "train": train, "deepspeed": {"zero_stage": 0}}
    method = {"type": given.method} | ({"base_precision": given.base_precision} if given.base_precision else {})
    return config.parse_run(
        {**tree, "method": method, "data": {"max_seq_len": given.seq, "train": [{"path": "-"}]}}, "bench"
    )


def batch_of(given: Any, rows: int, vocabulary: int, device: torch.device) -> Batch:
    """Full rows of random tokens, documents of one length."""
    shape = (rows, given.seq)
    ids = np.random.default_rng(0).integers(2, min(250, vocabulary), shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(given.seq) % given.document, shape).astype(np.int32)
    return collate(ids, np.roll(ids, -1, 1), positions, np.full(rows, given.seq, np.int32), device)


def take_step(model: ObjectiveModel, optimizer: AdamW, batch: Batch, accumulate: int) -> None:
    """What is timed: the gradients of so many micro-batches, and the optimizer. A GPU may still be at it: see `wait`."""
    for _ in range(accumulate):
        (model(batch)[0] / (batch.input_ids.numel() * accumulate)).backward()
    optimizer.step()
    optimizer.zero_grad()


def wait(device: torch.device) -> None:
    """Until all that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Prints tokens/s and, with --profile, the kernels that take the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rows", default="4")
    parser.add_argument("--batch", type=int, help="rows of a step; left out: rows × accumulate")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--base-precision", choices=("fp8", "int8"), help="products in 8 bits")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--document", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    run = run_of(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        use_expandable_segments()
    built = build_model(run.model, run.method, "bf16", 0)
    if given.base_precision:
        use_eight_bits(built, run.method, device)
    model = ObjectiveModel(built.to(device), Sft()).train()
    fit = tune_memory(run, model, DeviceMesh(0, 1, device))
    rows = fit.micro_batch_size
    accumulate = run.train.global_batch_size // rows
    optimizer = AdamW(list(trainable(built).values()), 1e-4, 0.0, 1.0, given.optimizer)
    batch = batch_of(given, rows, built.config.vocab_size, device)
    step = partial(take_step, model, optimizer, batch, accumulate)
    for _ in range(given.warmup):
        step()
    wait(device)
    began_s = time.perf_counter()
    for _ in range(given.steps):
        step()
    wait(device)
    speed = given.steps * accumulate * batch.input_ids.numel() / (time.perf_counter() - began_s)
    told = {
        "plain_loop": Path(given.model).name,
        "method": given.method,
        "seq": given.seq,
        "optimizer": given.optimizer,
    }
    told |= {
        "base_precision": given.base_precision,
        "rows": rows,
        "accumulate": accumulate,
        "recomputed": f"{fit.layers}/{fit.num_layers}",
    }
    if fit.peak is not None:
        told["expected_gib"] = round(fit.peak / 2**30, 1)
    if device.type == "cuda":
        told |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
        told |= {"reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1)}
    print(json.dumps({**told, "tokens_per_s": round(speed)}), flush=True)
    if given.profile:
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            step()
            wait(device)
        print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=80))


if __name__ == "__main__":
    main()
