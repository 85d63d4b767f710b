"""What stock DeepSpeed gives: ZeRO-3, sdpa, every layer recomputed, one row at once, nothing accumulated; as users begin.

    python -m torch.distributed.run --nproc-per-node 2 -m bench.stock_zero3 --shape 8b --steps 8

Random weights and rows full of tokens; fp32 masters and moments as DeepSpeed keeps them, its default settings otherwise.
Prints one JSON line: tokens/s per GPU (median after warm-up) and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.train_throughput import SHAPES, WARMUP_STEPS


def main() -> None:
    """Trains for some steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo")
    settings = dict(SHAPES[given.shape])
    (heads, kv_heads), tied = settings.pop("heads"), settings.pop("tied", False)
    shape = {"vocab_size": 128256, **settings, "tie_word_embeddings": tied}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 32768}
    stock = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
    }
    with deepspeed.zero.Init(config_dict_or_path=stock):
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    model.gradient_checkpointing_enable()
    model.train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=stock)
    seconds = []
    for _ in range(given.steps):
        rows = torch.randint(0, shape["vocab_size"], (1, given.seq), device=device)
        began_s = time.monotonic()
        engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
        engine.step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began_s)
    if torch.distributed.get_rank() == 0:
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        speed = given.seq / statistics.median(seconds[min(WARMUP_STEPS, given.steps - 1) :])
        told = {"stock": "zero-3", "shape": given.shape, "workers": torch.distributed.get_world_size()}
        print(json.dumps(told | {"tokens_per_s_per_gpu": round(speed), "peak_gib": round(peak, 1)}), flush=True)


if __name__ == "__main__":
    main()
