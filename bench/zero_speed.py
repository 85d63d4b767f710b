"""The step under ZeRO on all cards without Ray or data: the Trainer's own engine in a loop, for what its settings cost.

    python -m bench.zero_speed --shape 3b --method full --stage 3 --micro 4 --accumulate 2
    python -m bench.zero_speed --shape 3b --method full --stage 3 --set stage3_prefetch_bucket_size=5e8    # DeepSpeed's own keys
    python -m bench.zero_speed --shape tiny --ranks 2 --seq 128 --steps 2                                   # without a GPU

Prints one JSON line: tokens/s per card, seconds of a forward, a backward and a step's end, GiB on the card at most, and
what was expected of it. With --profile also what takes the time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.plain_loop import batch_of, wait
from bench.train_throughput import SHAPES
from ftray.compat.deepspeed import without_compiler
from ftray.compat.torch import use_expandable_segments
from ftray.train.parallel import DeviceMesh
from ftray.train.zero.engine import build_engine
from tests import cluster, ranks

GIB = 2**30


def measure(rank: int, run: Any, given: Namespace) -> dict[str, Any]:
    """One rank's figures."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        use_expandable_segments()
    without_compiler()
    importlib.import_module("deepspeed")
    built = build_engine(run, DeviceMesh.from_config(run.scale, device))
    engine = built.deepspeed
    vocabulary = SHAPES[given.shape].get("vocab_size", 128256)
    micro = built.memory.micro_batch_size
    accumulate = run.train.global_batch_size // (micro * dist.get_world_size())
    batch = batch_of(given, micro, vocabulary, device)
    spent = {"forward": 0.0, "backward": 0.0, "end": 0.0}

    def step(apart: bool) -> None:
        for _ in range(accumulate):
            marks = [time.perf_counter()]
            loss = engine(batch)[0]
            marks.append(_mark(device, apart))
            engine.backward(loss / (batch.input_ids.numel() * accumulate), scale_wrt_gas=False)
            marks.append(_mark(device, apart))
            engine.step()
            marks.append(_mark(device, apart))
            for key, a, b in zip(spent, marks, marks[1:], strict=False):
                spent[key] += b - a

    for _ in range(given.warmup):
        step(False)
    wait(device)
    began_s = time.perf_counter()
    for _ in range(given.steps):
        step(False)
    wait(device)
    seconds = (time.perf_counter() - began_s) / given.steps
    for key in spent:
        spent[key] = 0.0
    step(True)
    found = {
        "tokens_per_s_per_gpu": round(batch.input_ids.numel() * accumulate / seconds),
        "step_s": round(seconds, 3),
        "one_after_the_other_s": {key: round(value, 3) for key, value in spent.items()},
        "rows": micro,
        "accumulate": accumulate,
        "recomputed": built.memory.layers,
    }
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        found["expected_gib"] = built.memory.peak and round(built.memory.peak / GIB, 2)
    if given.profile:
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            step(False)
            wait(device)
        if rank == 0:
            for by in ("self_device_time_total", "self_cpu_time_total"):
                print(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70))
    return found


def _mark(device: torch.device, apart: bool) -> float:
    if apart:
        wait(device)
    return time.perf_counter()


def main() -> None:
    """Measures on every card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--method", choices=("lora", "full"), default="full")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--micro", default="1")
    parser.add_argument("--batch", type=int, help="rows of a step; left out: micro × accumulate × ranks")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--recompute", default="auto")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of DeepSpeed's zero_optimization")
    parser.add_argument("--ranks", type=int, help="left out: a rank for each card, or 2")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--document", type=int, default=512)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    given = parser.parse_args()
    work = given.work.absolute()
    number = given.ranks or torch.cuda.device_count() or 2
    making = [sys.executable, "-m", "bench.train_throughput", "--write-model", "--shape", given.shape]
    subprocess.run([*making, "--work", str(work)], check=True)
    zero = {key: json.loads(value) for key, _, value in (each.partition("=") for each in given.set)}
    settings: dict[str, Any] = {
        "method__type": given.method,
        "method__dropout": 0.0,
        "data__max_seq_len": given.seq,
        "train__precision": "bf16",
        "train__optimizer": given.optimizer,
        "train__gradient_checkpointing": given.recompute,
        "train__global_batch_size": given.batch or int(given.micro) * given.accumulate * number,
        "train__micro_batch_size": given.micro if given.micro == "auto" else int(given.micro),
        "deepspeed__zero_stage": given.stage,
        "deepspeed__overrides": {"zero_optimization": zero} if zero else {},
        "scale__num_workers": number,
    }
    run = cluster.make_run(work, work / f"model-{given.shape}", work, **settings)
    about = {"shape": given.shape, "method": given.method, "stage": given.stage, "set": given.set}
    print(json.dumps({**about, **ranks.run_ranks(number, measure, run, given)[0]}), flush=True)


if __name__ == "__main__":
    main()
