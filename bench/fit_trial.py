"""What `micro_batch_size: auto` and `gradient_checkpointing: auto` choose, against every setting that one could choose by hand.

    python -m bench.fit_trial --model .bench/model-3b --method full --seq 4096 --batch 8

The step of `bench.plain_loop`, in one process: first as a run chooses, then with each number of rows that divides the
batch, without recomputing, and where that is more than the card holds with half of the layers, then all of them; at
last the chosen rows with all layers recomputed, for what that costs. Prints a JSON line for each, and one with the
choice's share of the best speed.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from bench.plain_loop import OPTIMIZERS, batch_of, take_step, wait
from ftray import config
from ftray.compat.torch import use_expandable_segments
from ftray.model.lora import build_model, trainable
from ftray.train.batch import Batch
from ftray.train.memory import MemoryChoice
from ftray.train.memory_tuning import tune_memory
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import Sft
from ftray.train.optim.adamw import AdamW
from ftray.train.parallel import DeviceMesh


def run_of(given: Any, rows: int | str, recompute: str) -> config.RunConfig:
    """One setting as a run's."""
    train = {"global_batch_size": given.batch, "micro_batch_size": rows, "gradient_checkpointing": recompute}
    tree = {"name": "fit", "model": {"base": given.model}, "train": train | {"optimizer": given.optimizer}}
    data = {"max_seq_len": given.seq, "train": [{"path": "-"}]}
    method = {"type": given.method}
    return config.parse_run({**tree, "method": method, "data": data, "deepspeed": {"zero_stage": 0}}, "bench")


def measure(given: Any, fit: MemoryChoice, model: ObjectiveModel, optimizer: AdamW, batch: Batch) -> dict[str, Any]:
    """Tokens/s and GiB of a setting; what was wrong where memory ran out."""
    on_gpu, accumulate = batch.input_ids.is_cuda, given.batch // fit.micro_batch_size
    told: dict[str, Any] = {"rows": fit.micro_batch_size, "recomputed": f"{fit.layers}/{fit.num_layers}"}
    times = []
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(given.warmup + given.steps):
            began_s = time.perf_counter()
            take_step(model, optimizer, batch, accumulate)
            wait(batch.input_ids.device)
            times.append(time.perf_counter() - began_s)
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        torch.cuda.empty_cache()
        return told | {"out_of_memory": True}
    if on_gpu:
        told["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        torch.cuda.empty_cache()
    return told | {"tokens_per_s": round(given.batch * given.seq / float(np.median(times[given.warmup :])))}


def main() -> None:
    """Measures the choice and the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--document", type=int, default=512)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--no-hand", action="store_true", help="only the choice, and all layers recomputed")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        use_expandable_segments()
    run = run_of(given, "auto", "auto")
    built = build_model(run.model, run.method, "bf16", 0)
    vocabulary = built.config.vocab_size
    model = ObjectiveModel(built.to(device), Sft()).train()
    fit = tune_memory(run, model, DeviceMesh(0, 1, device))
    optimizer = AdamW(list(trainable(built).values()), 1e-6, 0.0, 1.0, given.optimizer)
    about = {"model": given.model.rsplit("/", 1)[-1], "method": given.method, "seq": given.seq, "batch": given.batch}
    batch = batch_of(given, fit.micro_batch_size, vocabulary, device)
    chosen = measure(given, fit, model, optimizer, batch)
    print(json.dumps({**about, "chosen": chosen}), flush=True)
    speeds = {"chosen": chosen.get("tokens_per_s", 0)}
    by_hand_rows = [] if given.no_hand else [n for n in range(1, given.batch + 1) if given.batch % n == 0]
    for rows in by_hand_rows:
        del batch
        batch = batch_of(given, rows, vocabulary, device)
        for recompute in ("none", "selective", "full"):
            by_hand = tune_memory(run_of(given, rows, recompute), model, DeviceMesh(0, 1, device))
            told = measure(given, by_hand, model, optimizer, batch)
            print(json.dumps({**about, "by_hand": told}), flush=True)
            if "tokens_per_s" in told:
                speeds[f"{rows} rows, {recompute}"] = told["tokens_per_s"]
                break
    batch = batch_of(given, fit.micro_batch_size, vocabulary, device)
    recomputed = tune_memory(run_of(given, fit.micro_batch_size, "full"), model, DeviceMesh(0, 1, device))
    print(json.dumps({**about, "recomputed": measure(given, recomputed, model, optimizer, batch)}), flush=True)
    best = max(speeds, key=speeds.__getitem__)
    print(
        json.dumps({**about, "best": best, "chosen_over_best": round(speeds["chosen"] / speeds[best], 4)}), flush=True
    )


if __name__ == "__main__":
    main()
