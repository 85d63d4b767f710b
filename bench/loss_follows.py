"""Training losses of each fast path against plain transformers in fp32 with every document alone: SmolLM2 on real rows.

    python -m bench.loss_follows prepare --gsm8k DIR --out rows.npz    # tokenizes train.jsonl and test.jsonl
    python -m bench.loss_follows run --rows rows.npz --steps 200 --out result.jsonl

The reference knows nothing of packing, kernels or our optimizer: padded batches, sdpa, PEFT's layers, torch's AdamW.
Prints for each path the relative difference of its losses to the reference's, and of the held-out loss at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftray import config, storage
from ftray.model import embedded
from ftray.model.load import resolve_base
from ftray.train.batch import collate
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import Sft
from ftray.train.optim.adamw import AdamW

SEQ, ROWS, RATES = 1024, 4, {"lora": 5e-4, "full": 3e-5}
PATHS = {  # name: (method, base, optimizer)
    "lora bf16": ("lora", None, "adamw"),
    "lora fp8": ("lora", "fp8", "adamw"),
    "lora int8": ("lora", "int8", "adamw"),
    "qlora nf4": ("qlora", None, "adamw"),
    "full bf16": ("full", None, "adamw"),
    "full fp8": ("full", "fp8", "adamw"),
    "full adamw-8bit": ("full", None, "adamw-8bit"),
}
Arrays = dict[str, Any]


def prepare(given: Any) -> None:
    """Packs GSM8K's conversations, answers supervised, and saves the rows."""
    from transformers import AutoTokenizer

    from ftray.chat import ChatFormat, Conversation, Message
    from ftray.data.packing import pack_examples

    directory = embedded.resolve(embedded.NAME, storage.cache_directory())
    chat = ChatFormat(AutoTokenizer.from_pretrained(directory))
    saved: Arrays = {}
    for split in ("train", "test"):
        examples = []
        for line in (Path(given.gsm8k) / f"{split}.jsonl").read_text().splitlines():
            record = json.loads(line)
            turns = (Message("user", record["question"]), Message("assistant", record["answer"]))
            encoded = chat.encode_example(Conversation(turns))
            examples.append((encoded.input_ids, encoded.loss_mask))
        rows = pack_examples(examples, SEQ, 0)
        order = np.random.default_rng(0).permutation(len(rows))[: given.limit if split == "train" else 64]
        for field in ("input_ids", "labels", "position_ids"):
            saved[f"{split}_{field}"] = np.stack([getattr(rows[i], field) for i in order]).astype(np.int32)
        saved[f"{split}_num_tokens"] = np.array([rows[i].num_tokens for i in order], np.int32)
    np.savez_compressed(given.out, **saved)


def batch_of(rows: Arrays, split: str, first: int, number: int) -> Arrays:
    """Rows `first` to `first + number` of a split."""
    fields = ("input_ids", "labels", "position_ids", "num_tokens")
    return {field: rows[f"{split}_{field}"][first : first + number] for field in fields}


def packed_loss(loss: ObjectiveModel, batch: Arrays, device: torch.device) -> torch.Tensor:
    """Our way: rows laid end to end."""
    out: torch.Tensor = loss(collate(**batch, device=device))[0]
    return out


def alone_loss(model: Any, batch: Arrays, device: torch.device) -> torch.Tensor:
    """The plain way: each document a padded row of its own."""
    documents = []
    for ids, labels, positions, n in zip(*batch.values(), strict=True):
        begins = [*np.flatnonzero(positions[:n] == 0), n]
        documents += [(ids[a:b], labels[a:b]) for a, b in pairwise(begins)]
    width = max(len(ids) for ids, _ in documents)
    arrays = np.zeros((3, len(documents), width), np.int64)
    arrays[1] = -100
    for i, (ids, labels) in enumerate(documents):
        arrays[0, i, : len(ids)], arrays[1, i, : len(ids)], arrays[2, i, : len(ids)] = ids, labels, 1
    ids, labels, mask = torch.from_numpy(arrays).to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def seed_adapters(model: torch.nn.Module) -> None:
    """The same A in every path: numbers from the parameter's name, rounded to bf16."""
    for name, p in model.named_parameters():
        if "lora_A" in name:
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
            values = np.random.default_rng(seed).uniform(-1, 1, p.shape) / p.shape[1] ** 0.5
            p.data.copy_(torch.from_numpy(values).bfloat16())


def train(
    loss_of: Callable[[Arrays], torch.Tensor], update: Callable[[], None], rows: Arrays, steps: int
) -> tuple[list[float], float]:
    """(loss of each step, held-out loss at the end), means over supervised tokens."""
    losses = []
    for step in range(steps):
        batch = batch_of(rows, "train", step * ROWS, ROWS)
        count = int((batch["labels"] >= 0).sum())
        loss = loss_of(batch) / count
        loss.backward()
        update()
        losses.append(loss.detach())
    total, number = 0.0, 0
    with torch.no_grad():
        for lo in range(0, len(rows["test_input_ids"]), ROWS):
            batch = batch_of(rows, "test", lo, ROWS)
            total += float(loss_of(batch))
            number += int((batch["labels"] >= 0).sum())
    return [float(x) for x in losses], total / number


def reference(base: str, method: str, rows: Arrays, steps: int, device: torch.device) -> tuple[list[float], float]:
    """Plain transformers, PEFT and torch in fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    directory = resolve_base(config.ModelConfig(base=base))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").to(device)
    if method == "lora":
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        seed_adapters(model)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATES[method], weight_decay=0.0)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return train(lambda batch: alone_loss(model, batch, device), update, rows, steps)


def fast(base: str, path: str, rows: Arrays, steps: int, device: torch.device) -> tuple[list[float], float]:
    """One of PATHS, as a run at stage 0 computes it."""
    from ftray.model.fp8 import use_eight_bits
    from ftray.model.lora import build_model, trainable

    method, precision, optimizer_name = PATHS[path]
    settings = config.MethodConfig.model_validate({"type": method, "base_precision": precision})
    built = build_model(config.ModelConfig(base=base), settings, "bf16", 0)
    if precision is not None:
        use_eight_bits(built, settings, device)
    seed_adapters(built)
    loss = ObjectiveModel(built, Sft()).train().to(device)
    rate = RATES["full" if method == "full" else "lora"]
    optimizer = AdamW(trainable(built).values(), rate, 0.0, 1.0, optimizer_name)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return train(lambda batch: packed_loss(loss, batch, device), update, rows, steps)


def run(given: Any) -> None:
    """References first: the fused kernels replace modules for the whole process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = dict(np.load(given.rows))
    paths = given.paths.split(",") if given.paths else list(PATHS)
    kinds = {path: "full" if PATHS[path][0] == "full" else "lora" for path in paths}
    references = {
        kind: reference(given.base, kind, rows, given.steps, device) for kind in dict.fromkeys(kinds.values())
    }
    for path in paths:
        began_s = time.monotonic()
        wanted, wanted_heldout = references[kinds[path]]
        losses, heldout = fast(given.base, path, rows, given.steps, device)
        gaps = np.abs(np.array(losses) - wanted) / np.array(wanted)
        result = {
            "path": path,
            "steps": given.steps,
            "loss_first_last": [round(losses[0], 4), round(losses[-1], 4)],
            "reference_first_last": [round(wanted[0], 4), round(wanted[-1], 4)],
            "gap_mean": round(float(gaps.mean()), 5),
            "gap_max": round(float(gaps.max()), 5),
            "heldout": round(heldout, 5),
            "heldout_reference": round(wanted_heldout, 5),
            "heldout_gap": round(heldout / wanted_heldout - 1, 5),
            "seconds": round(time.monotonic() - began_s, 1),
        }
        print(json.dumps(result), flush=True)
        if given.out:
            with Path(given.out).open("a") as sink:
                sink.write(json.dumps(result) + "\n")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("prepare", "run"))
    parser.add_argument("--gsm8k")
    parser.add_argument("--limit", type=int, default=200 * ROWS, help="rows of the training split")
    parser.add_argument("--rows")
    parser.add_argument("--base", default=embedded.NAME)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--paths", help=f"of {', '.join(PATHS)}; left out: all")
    parser.add_argument("--out")
    given = parser.parse_args()
    prepare(given) if given.verb == "prepare" else run(given)


if __name__ == "__main__":
    main()
