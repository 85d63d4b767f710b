"""The step without Ray, DeepSpeed or data: the same model, loss and optimizer in a loop, as a ceiling.

python bench/plain_loop.py --model .bench/model-8b --rows 4 --steps 10
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from ftray import config
from ftray.model.fp8 import quantize_base
from ftray.model.lora import build_model, trainable
from ftray.train.adamw import AdamW
from ftray.train.loss import SummedLoss, flatten_rows


def main() -> None:
    """Prints tokens/s and, with --profile, the kernels that take the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw-8bit"))
    parser.add_argument("--fp8", action="store_true", help="the frozen base in 8-bit floats")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = build_model(config.Model(base=given.model), config.Method(type=given.method), "bf16", 0)
    if given.fp8:
        quantize_base(built, device)
    model = SummedLoss(built.to(device)).train()
    optimizer = AdamW(list(trainable(built).values()), 1e-4, 0.0, 1.0, given.optimizer)
    rng = np.random.default_rng(0)
    shape = (given.rows, given.seq)
    ids = rng.integers(2, 250, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(given.seq) % 512, shape).astype(np.int32)
    batch = flatten_rows(ids, np.roll(ids, -1, 1), positions, np.full(given.rows, given.seq, np.int32), device)

    def step() -> None:
        for _ in range(given.accumulate):
            loss = model(*vars(batch).values()) / (batch.input_ids.numel() * given.accumulate)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(given.warmup):
        step()
    wait()
    began_s = time.perf_counter()
    for _ in range(given.steps):
        step()
    wait()
    speed = given.steps * given.accumulate * ids.size / (time.perf_counter() - began_s)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    told = {"plain_loop": given.method, "rows": given.rows, "accumulate": given.accumulate, "optimizer": given.optimizer}
    print(json.dumps({**told, "tokens_per_s": round(speed), "peak_gib": round(peak, 1)}), flush=True)
    if given.profile:
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            step()
            wait()
        print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=60))


if __name__ == "__main__":
    main()
