"""Proposes a run file for a data set: task metrics, sequence length, batch size and steps, and a base that fits the hardware."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ftray.data.profile import SourceProfile

EMBEDDED = "embedded:smollm2-135m-instruct"
# Memory of a GPU from which a base fits with LoRA at a few thousand tokens per sequence, the largest first.
BASES = ((38.0, "Qwen/Qwen2.5-7B-Instruct"), (20.0, "Qwen/Qwen3-4B-Instruct-2507"), (0.0, "Qwen/Qwen2.5-1.5B-Instruct"))
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens per sequence
PACKED_RECORDS = 4  # a sequence has room for that many middling records
MIN_STEPS, MAX_BATCH = 100, 128
MAX_EPOCHS = 3
MIN_EVAL = 30  # records, below which intervals are wide
FRACTION, MAX_EVAL = 0.1, 1000  # of the records for evaluation, and at most how many
LEARNING_RATES = {True: 1e-3, False: 2e-4}  # by whether the base is small


@dataclass(frozen=True)
class Hardware:
    """GPUs of this machine. gib: Memory of the smallest one."""

    num_gpus: int
    gib: float


@dataclass(frozen=True)
class Proposal:
    """A run file as text, and the facts behind it as pairs of name and text."""

    text: str
    facts: list[tuple[str, str]]


def find_hardware() -> Hardware:
    """The GPUs that torch sees."""
    import torch

    num_gpus = torch.cuda.device_count()
    sizes = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(num_gpus)]
    return Hardware(num_gpus, min(sizes, default=0.0))


def choose_base(hardware: Hardware) -> str:
    """A base that fits one GPU with LoRA, or the embedded one without a GPU."""
    if not hardware.num_gpus:
        return EMBEDDED
    return next(base for gib, base in BASES if hardware.gib >= gib)


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that is not below `share` of the values."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def propose(
    profile: SourceProfile,
    name: str,
    base: str,
    hardware: Hardware,
    lengths: Sequence[int],
    answer_lengths: Sequence[int],
    is_estimated: bool,
) -> Proposal:
    """A run file for a data set.

    Args:
        profile: The data set.
        name: The run's name.
        base: The base.
        hardware: This machine.
        lengths: Tokens of each sampled record with the base's template.
        answer_lengths: Tokens of each sampled record's last answer.
        is_estimated: The lengths are estimated from characters.
    """
    max_seq_len = _sequence_length(lengths)
    num_eval = min(MAX_EVAL, max(MIN_EVAL, round(FRACTION * profile.num_records)))
    fraction = min(0.5, num_eval / profile.num_records)
    num_train = max(1, round(profile.num_records * (1 - fraction)))
    sequences = max(1, round(num_train * sum(lengths) / len(lengths) / max_seq_len / 0.97))
    workers = hardware.num_gpus or 2
    epochs, batch, steps = _batch_and_steps(sequences, workers)
    is_small = base == EMBEDDED or "135m" in base.lower() or "360m" in base.lower()
    tokens = "estimated from characters" if is_estimated else "with this base's template"
    middle, p99 = percentile(lengths, 0.5), percentile(lengths, 0.99)
    facts = [
        ("data", f"{_count(profile)} records in {profile.num_files} file{'' if profile.num_files == 1 else 's'}"),
        ("task", _TASKS[profile.task] + (f" with {len(profile.labels)} labels" if profile.labels else "")),
        ("lengths", f"median {middle}, 99% at most {p99}, longest {max(lengths)} tokens ({tokens})"),
        ("base", base + ("" if hardware.num_gpus else "; there is no GPU, and this one trains on CPUs")),
        ("steps", f"about {steps} of {batch} sequences with {max_seq_len} tokens, {epochs} epoch{'s' * (epochs > 1)}"),
    ]
    values = {
        "name": name, "base": base, "max_seq_len": max_seq_len, "fraction": float(f"{fraction:.2g}"), "epochs": epochs,
        "batch": batch, "steps": steps, "workers": workers, "learning_rate": LEARNING_RATES[is_small],
        "precision": "bf16" if hardware.num_gpus else "fp32", "num_eval": num_eval,
        "max_new_tokens": _answer_limit(answer_lengths, max_seq_len),
    }  # fmt: skip
    return Proposal(_run_file(profile, values), facts)


_TASKS = {
    "chat": "chat",
    "classify": "classification",
    "summarize": "summarization",
    "extract": "extraction of JSON",
    "tools": "tool use",
    "pretrain": "continued pretraining on plain text",
}


def _count(profile: SourceProfile) -> str:
    return f"{profile.num_records:,}" if profile.is_exact else f"about {profile.num_records:,}"


def _sequence_length(lengths: Sequence[int]) -> int:
    """The shortest usual length that holds every sampled record, and several middling ones."""
    needed = max(*lengths, min(PACKED_RECORDS * percentile(lengths, 0.5), 4096))
    return next((length for length in LENGTHS if length >= needed), math.ceil(needed / 1024) * 1024)


def _batch_and_steps(sequences: int, workers: int) -> tuple[int, int, int]:
    """Epochs, global batch size and steps: at least MIN_STEPS steps if the data has enough sequences."""
    epochs = MAX_EPOCHS if sequences < MIN_STEPS * MAX_BATCH // 8 else 1
    batch = workers
    while batch * 2 <= MAX_BATCH and epochs * sequences / (batch * 2) >= MIN_STEPS:
        batch *= 2
    return epochs, batch, max(1, epochs * sequences // batch)


def _answer_limit(answer_lengths: Sequence[int], max_seq_len: int) -> int:
    """Room for nearly every answer, in steps of 8 tokens."""
    longest = percentile(answer_lengths, 0.99) if answer_lengths else 64
    return min(max_seq_len // 2, max(16, math.ceil(1.25 * longest / 8) * 8))


def _run_file(profile: SourceProfile, values: dict[str, Any]) -> str:
    source = {"path": profile.path, **({"columns": profile.columns} if profile.columns else {})}
    if profile.ignore:
        source["ignore"] = list(profile.ignore)
    lines = [
        f"# {_TASKS[profile.task].capitalize()} on {profile.path}. Written by `ftray init`; all keys: docs/run-file.md.",
        f"name: {_scalar(values['name'])}",
        f"storage: {'runs':<42}# the run owns runs/{values['name']}/; s3://bucket/prefix works, too",
        f"model: {{base: {_scalar(values['base'])}}}",
        "method: {type: lora, rank: 16, alpha: 32}         # adapters on all linear layers",
        "data:",
        f"  max_seq_len: {values['max_seq_len']:<36}# tokens per packed sequence; longer records are an error",
        f"  train: [{_flow(source)}]",
        f"  eval: {_flow(_eval_split(profile, values['fraction']))}  # chosen by each record's hash; never trained on",
    ]
    if profile.labels:
        lines.append(f"  labels: {_flow(list(profile.labels))}")
    lines += [
        "train:",
        f"  epochs: {values['epochs']}",
        f"  global_batch_size: {values['batch']:<30}# sequences per step: about {values['steps']} steps in all",
        f"  learning_rate: {values['learning_rate']:g}",
        f"  precision: {values['precision']}",
        f"deepspeed: {{zero_stage: 0}}{'':<24}# nothing is sharded; 3 for bases that exceed one GPU",
        f"scale: {{num_workers: {values['workers']}}}",
        f"checkpoint: {{every: {max(10, values['steps'] // 5)}}}",
        "evaluate:",
        f"  every: {max(5, values['steps'] // 10):<42}# steps between eval losses",
        *_metrics(profile),
    ]
    if profile.task != "pretrain":
        lines += [
            f"  num_generations: {min(values['num_eval'], 200):<32}# eval records that both models answer",
            f"  max_new_tokens: {values['max_new_tokens']}",
        ]
    return "\n".join(lines) + "\n"


def _eval_split(profile: SourceProfile, fraction: float) -> dict[str, Any]:
    """The split; each class of a classification is in it, if the class is a column."""
    column = (profile.columns or {}).get("assistant")
    return {"fraction": fraction, **({"stratify": column} if profile.task == "classify" and column else {})}


def _metrics(profile: SourceProfile) -> list[str]:
    metrics = {
        "chat": "[loss, rouge]",
        "classify": "[loss, exact, classes]" if _has_sklearn() else "[loss, exact]",
        "summarize": "[loss, rouge]",
        "extract": "[loss, exact, json]",
        "tools": "[loss]",
        "pretrain": "[loss]",
    }
    comments = {
        "classify": "accuracy and macro F1 of the labels" if _has_sklearn() else "share of correct labels",
        "extract": "share of equal answers, and of answers that are valid JSON",
    }
    comment = comments.get(profile.task)
    line = f"  metrics: {metrics[profile.task]}"
    return [f"{line:<51}# {comment}" if comment else line]


def _has_sklearn() -> bool:
    from importlib.util import find_spec

    return find_spec("sklearn") is not None


def _scalar(text: str) -> str:
    return yaml.safe_dump(text, allow_unicode=True, width=10_000).removesuffix("\n...\n").rstrip("\n")


def _flow(value: Any) -> str:
    """A value in YAML's flow style, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if not isinstance(value, str):
        return f"{value:g}"
    is_plain = re.fullmatch(r"[A-Za-z0-9_./-][\w ./-]*", value) and yaml.safe_load(value) == value
    return value if is_plain else json.dumps(value, ensure_ascii=False)
