"""ftray against TRL on the same card and the same rows, one after the other: tokens/s of real tokens, and the ratios.

    python -m bench.versus_trl --shape 8b --method lora --steps 8
    python -m bench.versus_trl --shape 8b --method lora --gsm8k …/train.jsonl --tokenizer …/smollm2-135m-instruct-1

TRL (not among ftray's dependencies: `pip install trl`) runs twice: as it comes (`defaults`: batches of 8 documents,
padded, recomputing) and as fast as its settings make it (`best`: packed rows, Liger's kernels, no recomputing). ftray
runs through `ftray train`. Each in a process of its own. Rows are random letters, or with --gsm8k its questions and
answers (records with question and answer) in the tokens of --tokenizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.train_throughput import SHAPES, write_data

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "best": {"packing": True, "use_liger_kernel": True, "gradient_checkpointing": False},
}


def run_trl(given: Any) -> dict[str, Any]:
    """Trains with TRL in this process; tokens/s is the median of its steps times the mean row's real tokens."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Notes when each step ends, its work done."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.monotonic())

    on_gpu, rows = torch.cuda.is_available(), 8 if given.one == "defaults" else given.trl_rows or given.micro
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            max_steps=given.steps,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1 if given.one == "defaults" else given.accumulate,
            max_length=given.seq,
            bf16=True,
            use_cpu=not on_gpu,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            model_init_kwargs={"dtype": "bfloat16"},
            **{k: v for k, v in SETTINGS[given.one].items() if on_gpu or k != "use_liger_kernel"},
        )
        adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=str(given.model),
            args=settings,
            train_dataset=load_dataset("json", data_files=str(given.data / "part-000.jsonl"), split="train"),
            peft_config=adapters if given.method == "lora" else None,
            callbacks=[Clock()],
        )
        trainer.train()
    tokens = statistics.mean(len(row["input_ids"]) for row in trainer.train_dataset)
    step_s = statistics.median(b - a for a, b in zip(times[given.warmup :], times[given.warmup + 1 :], strict=False))
    per_step = tokens * rows * settings.gradient_accumulation_steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"trl": given.one, "rows": rows, "tokens_per_s": round(per_step / step_s), "peak_gib": round(peak, 1)}


def run_ftray(given: Any) -> dict[str, Any]:
    """The same through `ftray train`, on the same data."""
    command = [sys.executable, "-m", "bench.train_throughput", "--shape", given.shape, "--method", given.method]
    command += ["--micro", str(given.micro), "--accumulate", str(given.accumulate), "--steps", str(given.steps)]
    command += ["--warmup", str(given.warmup), "--seq", str(given.seq), "--document", str(given.document)]
    command += ["--stage", "0", "--work", str(given.work), *(["--data", str(given.data)] if given.gsm8k else [])]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def write_gsm8k(given: Any) -> None:
    """Puts questions and answers, a document each, where both find them, and the tokenizer into the model's directory."""
    given.data.mkdir(parents=True, exist_ok=True)
    with given.gsm8k.open() as source, (given.data / "part-000.jsonl").open("w") as sink:
        for record in map(json.loads, source):
            sink.write(json.dumps({"text": record["question"] + "\n" + record["answer"]}) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (given.model / name).unlink(missing_ok=True)
        if (given.tokenizer / name).exists():
            shutil.copy(given.tokenizer / name, given.model / name)


def main() -> None:
    """Runs all three, or one of TRL's in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--micro", type=int, default=2, help="packed rows at once, of ftray and of TRL's best")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--trl-rows", type=int, help="rows at once of TRL's best, if other")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--document", type=int, default=500)
    parser.add_argument("--gsm8k", type=Path, help="jsonl with question and answer instead of random letters")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer for --gsm8k")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.work = given.work.absolute()
    kind = "gsm8k" if given.gsm8k else f"trl-{given.seq}"
    given.model, given.data = given.work / f"model-{given.shape}", given.work / f"data-{kind}"
    if given.one:
        print(json.dumps(run_trl(given)), flush=True)
        return
    making = [sys.executable, "-m", "bench.train_throughput", "--write-model", "--shape", given.shape]
    subprocess.run([*making, "--work", str(given.work)], check=True)
    rows = max(8, given.micro * given.accumulate)
    if given.gsm8k:
        write_gsm8k(given)
    else:
        write_data(given.data, int(1.2 * (given.steps + 1) * rows * given.seq), given.document, given.seq - 8)
    found = {}
    for name in SETTINGS:
        command = [sys.executable, "-m", "bench.versus_trl", *sys.argv[1:], "--one", name]
        told = subprocess.run(command, check=False, capture_output=True, text=True)
        lines = told.stdout.strip().splitlines()
        result = json.loads(lines[-1]) if told.returncode == 0 else {"trl": name, "failed": told.stderr[-1500:]}
        print(json.dumps(result), flush=True)
        found[name] = result.get("tokens_per_s")
    ours = run_ftray(given)
    print(json.dumps(ours), flush=True)
    speed = ours.get("tokens_per_s_per_gpu")
    ratios = {f"times_{name}": round(speed / other, 2) for name, other in found.items() if other and speed}
    print(json.dumps({"shape": given.shape, "method": given.method, **ratios}), flush=True)


if __name__ == "__main__":
    main()
