"""Tokens per second of `ftray train` itself: Ray, Ray Data and DeepSpeed running, random weights of known shapes.

    python -m bench.train_throughput --shape 8b --method lora --workers 1 --micro 4 --steps 12 --out result.jsonl

Prints one JSON line: tokens/s per GPU (median after warm-up), model TFLOP/s by `flops_per_token`, peak memory, data
wait. The run is ended before its last checkpoint. `--shape tiny` is the CPU-sized smoke.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.watched_train import watch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "heads": (4, 2), "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": (32, 8), "tied": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "heads": (24, 8), "tied": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "heads": (32, 8)},
    "45b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 50, "heads": (64, 8)},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "heads": (64, 8)},
}
LARGE = ("45b", "70b")  # made layer by layer: more than a card holds
WARMUP_STEPS = 4


def write_model(directory: Path, shape: str) -> int:
    """A Llama of that shape with random bf16 weights, and a tokenizer; returns its number of parameters."""
    import torch
    from transformers import LlamaForCausalLM

    number = directory / "num_parameters"
    if number.exists():
        return int(number.read_text())
    if shape in LARGE:
        count = write_by_layers(directory, shape)
    else:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(llama_config(shape))
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(directory)
        count = sum(p.numel() for p in model.parameters())
        del model
    write_tokenizer(directory)
    number.write_text(str(count))
    return count


def llama_config(shape: str) -> Any:
    """transformers' config of a shape."""
    from transformers import LlamaConfig

    settings = dict(SHAPES[shape])
    heads, kv_heads = settings.pop("heads")
    tied = settings.pop("tied", False)
    return LlamaConfig(
        **{"vocab_size": 128256, **settings},
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        dtype="bfloat16",
    )


def write_by_layers(directory: Path, shape: str) -> int:
    """As `write_model`, a file for each layer, so that memory holds one; the same random numbers again and again."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config = llama_config(shape)
    with torch.device("meta"):
        outline = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    noise = torch.empty(2**28 + 1, dtype=torch.bfloat16).normal_(std=config.initializer_range)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, p in outline.named_parameters():
        key = name.split(".")[2] if ".layers." in name else name.rsplit(".", 1)[0]
        files.setdefault(f"model-{key}.safetensors", {})[name] = p.shape
    for file, shapes in files.items():
        tensors = {}
        for name, size in shapes.items():
            repeats = -(-size.numel() // len(noise))  # of an odd length: rows differ
            is_norm = name.endswith("norm.weight")
            flat = torch.ones(size.numel(), dtype=noise.dtype) if is_norm else noise.repeat(repeats)[: size.numel()]
            tensors[name] = flat.view(size)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in files.items() for name in shapes}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(p.numel() for p in outline.parameters())


def write_tokenizer(directory: Path) -> None:
    """A token for each byte, and ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*specials, *sorted(letters)])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=specials[0], eos_token=specials[1])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(directory)


def write_data(directory: Path, num_tokens: int, document_tokens: int, limit: int) -> Path:
    """Plain-text documents of about document_tokens bytes, a token each; none longer than `limit`."""
    rng = random.Random(0)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "part-000.jsonl").open("w") as file:
        written = 0
        while written < num_tokens:
            length = min(limit, max(16, int(rng.gauss(document_tokens, document_tokens / 3))))
            file.write(json.dumps({"text": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=length))}) + "\n")
            written += length + 1
    return directory


def flops_per_token(num_parameters: int, method: str, shape: str) -> float:
    """Model FLOPs of a token: 6 per weight in a full step, 4 where frozen weights need no gradient of their own.

    Embedding look-ups cost nothing; attention scores inside short documents are left out.
    """
    settings = SHAPES[shape]
    embedding = settings.get("vocab_size", 128256) * settings["hidden_size"]
    matrices = num_parameters - (0 if settings.get("tied") else embedding)
    return (6 if method == "full" else 4) * matrices


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--method", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--micro", default="2", help="rows at once, or auto (then --batch)")
    parser.add_argument("--batch", type=int, help="rows of a step; left out: micro × accumulate × workers")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--document", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=WARMUP_STEPS)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds until it is given up")
    parser.add_argument("--write-model", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help="directory of jsonl files with `text`; left out: random letters")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("override", nargs="*")
    given = parser.parse_args()
    work = given.work.absolute()
    model = work / f"model-{given.shape}"
    if given.write_model:
        write_model(model, given.shape)
        return
    # In a process of its own, so that none of the GPU's memory stays taken.
    making = [
        sys.executable,
        "-m",
        "bench.train_throughput",
        "--write-model",
        "--shape",
        given.shape,
        "--work",
        str(work),
    ]
    subprocess.run(making, check=True)
    count = int((model / "num_parameters").read_text())
    batch = given.batch or int(given.micro) * given.accumulate * given.workers
    data = given.data or write_data(
        work / f"data-{given.seq}", int(1.1 * (given.steps + 1) * batch * given.seq), given.document, given.seq - 8
    )
    name = f"{given.shape}-{given.method}-{given.workers}x{given.micro}-b{batch}-z{given.stage}-{given.seq}"
    run = {
        "name": name,
        "storage": str(work / "runs"),
        "model": {"base": str(model)},
        "method": {"type": given.method},
        "data": {
            "max_seq_len": given.seq,
            "train": [{"path": str(data), "format": "text"}],
            "clean": {"near_duplicates": "off"},
        },
        "train": {
            "max_steps": given.steps + 1,
            "global_batch_size": batch,
            "micro_batch_size": given.micro if given.micro == "auto" else int(given.micro),
        },
        "deepspeed": {"zero_stage": given.stage},
        "scale": {"num_workers": given.workers},
        "checkpoint": {"every": 10_000},
    }
    file = work / f"{name}.yaml"
    file.write_text(json.dumps(run))  # JSON is YAML
    subprocess.run(["rm", "-rf", str(work / "runs" / name)], check=True)
    began_s = time.monotonic()
    events, failed = watch(file, given.override, given.steps, given.limit, work / f"{name}.log")
    result: dict[str, Any] = {"run": name, "override": given.override, "wall_s": round(time.monotonic() - began_s)}
    lines = [e for e in events if e["event"] == "step"][given.warmup :]
    if failed or not lines:
        result["failed"] = failed[-2500:]
    else:
        speed = statistics.median(x["tokens_per_s"] for x in lines) / given.workers
        seconds = sum(x["num_tokens"] / max(x["tokens_per_s"], 1e-9) for x in lines)
        result |= {
            "tokens_per_s_per_gpu": round(speed),
            "tflops": round(speed * flops_per_token(count, given.method, given.shape) / 1e12, 1),
            "peak_memory_gib": max(x.get("peak_memory_gib", 0) for x in lines),
            "data_wait_share": round(sum(x["data_wait_s"] for x in lines) / seconds, 4),
            "loss": [round(x["loss"], 4) for x in lines[-2:]],
            "fit": next(({k: v for k, v in e.items() if k != "event"} for e in events if e["event"] == "fit"), None),
        }
    print(json.dumps(result), flush=True)
    if given.out:
        with given.out.open("a") as sink:
            sink.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
