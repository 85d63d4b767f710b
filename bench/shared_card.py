"""Two trials of a sweep that share one GPU, against each of them alone on it: losses step by step, and time.

    python -m bench.shared_card --shape 1b --steps 8      # without a GPU: --shape tiny, exact

Prints one JSON line for each trial: the losses, and the largest relative difference to those of `ftray train` with the
trial's settings. `precision: fp32` (the default without a GPU) leaves nothing to differ on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.train_throughput import SHAPES, write_data

RATES = (1e-4, 3e-4)


def losses_of(run: Path) -> list[float]:
    """The loss of each step, from metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "step" in line]


def ftray(*arguments: str) -> float:
    """Runs a verb; its seconds."""
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "ftray.cli.main", *arguments], check=True, stdout=sys.stderr)
    return round(time.monotonic() - began_s, 1)


def main() -> None:
    """The sweep, then each trial's settings alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    given = parser.parse_args()
    work, on_gpu = given.work.absolute(), torch.cuda.is_available()
    making = [sys.executable, "-m", "bench.train_throughput", "--write-model", "--shape", given.shape]
    subprocess.run([*making, "--work", str(work)], check=True)
    tokens = int(1.2 * (given.steps + 1) * 4 * given.seq)
    data = [
        write_data(work / f"shared-{name}", size, 300, given.seq - 8)
        for name, size in (("train", tokens), ("eval", tokens // 8))
    ]
    tree: dict[str, Any] = {
        "name": "shared",
        "storage": str(work / "shared-runs"),
        "model": {"base": str(work / f"model-{given.shape}")},
        "method": {"type": "lora", "rank": 8, "alpha": 16},
        "data": {
            "max_seq_len": given.seq,
            "train": [{"path": str(data[0]), "format": "text"}],
            "eval": [{"path": str(data[1]), "format": "text"}],
            "clean": {"near_duplicates": "off", "contamination": "off"},
        },
        "train": {"max_steps": given.steps, "global_batch_size": 4, "micro_batch_size": 2},
        "deepspeed": {"zero_stage": 0},
        "scale": {"num_workers": 1, **({"gpus_per_worker": 0.5} if on_gpu else {})},
        "evaluate": {"every": given.steps // 2},
        "checkpoint": {"every": given.steps},
        "tune": {
            "num_trials": len(RATES),
            "search": "grid",
            "scheduler": "none",
            "space": {"train.learning_rate": {"type": "choice", "values": list(RATES)}},
        },
    }
    tree["train"]["precision"] = "bf16" if on_gpu else "fp32"
    file = work / "shared.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    subprocess.run(["rm", "-rf", tree["storage"]], check=True)
    together_s = ftray("tune", str(file))
    for number, rate in enumerate(RATES):
        name = f"alone-{number}"
        alone_s = ftray("train", str(file), f"name={name}", f"train.learning_rate={rate}")
        runs = Path(tree["storage"])
        alone, shared = losses_of(runs / name), losses_of(runs / "shared" / "tune" / f"trial-{number:03d}")
        gaps = [abs(a - b) / abs(b) for a, b in zip(shared, alone, strict=True)]
        told = {"learning_rate": rate, "losses": [round(x, 5) for x in shared], "gap_max": max(gaps)}
        print(json.dumps({**told, "together_s": together_s, "alone_s": alone_s}), flush=True)


if __name__ == "__main__":
    main()
