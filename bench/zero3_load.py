"""What a card and a machine hold while a model is loaded under ZeRO-3: the Trainer's own engine on all cards, no Ray.

    python -m bench.zero3_load --shape 45b --method lora      # a model that no card holds whole
    python -m bench.zero3_load --shape tiny --ranks 2         # without a GPU

Prints one JSON line a rank: GiB at most on the card while loading and in one step, and what is left in between; host
memory of its own (anonymous) and mapped from files at most; seconds; what was chosen to fit; the loss.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.train_throughput import SHAPES
from ftray.compat.deepspeed import without_compiler
from ftray.compat.torch import use_expandable_segments
from ftray.train.batch import Batch
from ftray.train.parallel import DeviceMesh
from ftray.train.zero.engine import build_engine
from tests import cluster, ranks

GIB = 2**30


@contextmanager
def host_peaks() -> Iterator[dict[str, float]]:
    """GiB of this process's memory at most while inside: looked at every 10 ms."""
    peaks, done = {"RssAnon": 0.0, "RssFile": 0.0}, threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) / 2**20)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def load(rank: int, run: Any) -> dict[str, Any]:
    """One rank's figures."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        use_expandable_segments()
    without_compiler()
    importlib.import_module("deepspeed")  # seconds that don't count
    dist.barrier()
    began_s = time.monotonic()
    with host_peaks() as host:
        built = build_engine(run, DeviceMesh.from_config(run.scale, device))
    engine, parameters = built.deepspeed, built.parameters
    found: dict[str, Any] = {"rank": rank, "seconds": round(time.monotonic() - began_s, 1)}
    numel = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
    found["parameters"], found["trained"] = numel, sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values())
    found["card"] = card_peak(device) | {"left": card_now(device)}
    found["host"] = {key: round(value, 2) for key, value in host.items()}
    fit = built.memory
    found["fit"] = {
        "micro": fit.micro_batch_size,
        "recomputed": fit.layers,
        "gib": fit.peak and round(fit.peak / GIB, 1),
    }
    batch = ranks.tiny_batch(0, rank)
    moved = Batch(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in batch))
    loss = engine(moved)[0]
    engine.backward(loss / 60, scale_wrt_gas=False)
    engine.step()
    found["loss"], found["card in a step"] = round(float(loss.detach()) / 60, 4), card_peak(device)
    return found


def card_now(device: torch.device) -> float:
    """GiB on the card now."""
    return round(torch.cuda.memory_allocated(device) / GIB, 2) if device.type == "cuda" else 0.0


def card_peak(device: torch.device) -> dict[str, float]:
    """GiB on the card at most since the last call."""
    if device.type != "cuda":
        return {}
    peak = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    torch.cuda.reset_peak_memory_stats(device)
    return {key: round(value / GIB, 2) for key, value in peak.items()}


def main() -> None:
    """Loads on every card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--offload", choices=("none", "optimizer", "all"), default="none")
    parser.add_argument("--ranks", type=int, help="left out: a rank for each card, or 2")
    parser.add_argument("--micro", default="auto")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    asked = parser.parse_args()
    work = asked.work.absolute()
    number = asked.ranks or torch.cuda.device_count() or 2
    making = [sys.executable, "-m", "bench.train_throughput", "--write-model", "--shape", asked.shape]
    subprocess.run([*making, "--work", str(work)], check=True)
    settings: dict[str, Any] = {
        "method__type": asked.method,
        "method__dropout": 0.0,
        "data__max_seq_len": asked.seq,
        "train__precision": "bf16",
        "train__global_batch_size": 8 * number,
        "train__micro_batch_size": asked.micro if asked.micro == "auto" else int(asked.micro),
        "deepspeed__zero_stage": asked.stage,
        "deepspeed__offload": asked.offload,
        "scale__num_workers": number,
    }
    run = cluster.make_run(work, work / f"model-{asked.shape}", work, **settings)
    for found in ranks.run_ranks(number, load, run):
        print(json.dumps({"shape": asked.shape, "method": asked.method, "stage": asked.stage, **found}), flush=True)


if __name__ == "__main__":
    main()
