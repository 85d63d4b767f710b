"""Invalid combinations of settings: one table for `ftray check`, docs/compatibility.md and tests.

Every pair of `CHOICES` that no rule excludes can be trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Settings that can exclude each other, by dotted key, with the values that matter.
CHOICES: dict[str, tuple[Any, ...]] = {
    "method.type": ("full", "lora", "qlora", "prompt-tuning"),
    "method.rslora": (False, True),
    "method.dora": (False, True),
    "method.freeze": ([], ["embed_tokens"]),
    "method.base_precision": (None, "fp8", "int8"),
    "train.precision": ("bf16", "fp16", "fp32"),
    "train.label_smoothing": (0.0, 0.1),
    "train.optimizer": ("adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"),
    "deepspeed.zero_stage": (0, 1, 2, 3),
    "deepspeed.offload": ("none", "optimizer", "all"),
}


@dataclass(frozen=True)
class Rule:
    """Two settings that exclude each other. `first` and `second` are (dotted key, values); True matches any non-empty value."""

    first: tuple[str, tuple[Any, ...]]
    second: tuple[str, tuple[Any, ...]]
    reason: str
    instead: str


ADAPTERS_ONLY = "it applies to adapters only"
RULES: tuple[Rule, ...] = (
    Rule(
        ("method.type", ("qlora",)),
        ("deepspeed.zero_stage", (3,)),
        "4-bit weights can't be sharded",
        "use zero_stage 2",
    ),
    Rule(
        ("method.rslora", (True,)),
        ("method.type", ("full", "prompt-tuning")),
        ADAPTERS_ONLY,
        "use lora, or remove rslora",
    ),
    Rule(
        ("method.dora", (True,)), ("method.type", ("full", "prompt-tuning")), ADAPTERS_ONLY, "use lora, or remove dora"
    ),
    Rule(
        ("method.freeze", (True,)),
        ("method.type", ("lora", "qlora", "prompt-tuning")),
        "the base is already frozen",
        "use full, or remove freeze",
    ),
    Rule(
        ("method.base_precision", ("fp8", "int8")),
        ("method.type", ("qlora", "prompt-tuning")),
        "8-bit products are for LoRA's base and for full fine-tuning",
        "use lora or full, or remove base_precision",
    ),
    Rule(
        ("method.base_precision", ("int8",)),
        ("method.type", ("full",)),
        "int8 products need a frozen base",
        "use lora, or fp8, or remove base_precision",
    ),
    Rule(
        ("method.base_precision", ("fp8", "int8")),
        ("train.precision", ("fp16", "fp32")),
        "8-bit products return bf16",
        "use bf16, or remove base_precision",
    ),
    Rule(
        ("method.base_precision", ("fp8", "int8")),
        ("method.dora", (True,)),
        "DoRA reads the base's weights directly",
        "remove one of them",
    ),
    Rule(
        ("method.base_precision", ("fp8", "int8")),
        ("deepspeed.zero_stage", (3,)),
        "8-bit products don't support sharded weights",
        "use zero_stage 2",
    ),
    Rule(
        ("train.optimizer", ("adamw-8bit", "adamw-8bit-paged")),
        ("deepspeed.zero_stage", (1, 2, 3)),
        "ZeRO shards fp32 states",
        "use zero_stage 0, or adamw",
    ),
    Rule(
        ("train.optimizer", ("adamw-paged",)),
        ("deepspeed.zero_stage", (1, 2, 3)),
        "DeepSpeed offloads sharded states itself",
        "use zero_stage 0, or adamw with offload optimizer",
    ),
    Rule(
        ("train.precision", ("fp16",)),
        ("deepspeed.zero_stage", (0,)),
        "DeepSpeed has no loss scaling at stage 0",  # 0.19.8: its backward does so for ZeRO's optimizers only
        "use zero_stage 1",
    ),
    Rule(
        ("deepspeed.offload", ("optimizer",)),
        ("deepspeed.zero_stage", (0,)),
        "DeepSpeed offloads sharded states only",
        "use zero_stage 1, 2 or 3, or optimizer adamw-paged",
    ),
    Rule(
        ("deepspeed.offload", ("all",)),
        ("deepspeed.zero_stage", (0, 1, 2)),
        "only sharded weights can be offloaded",
        "use zero_stage 3, or offload optimizer",
    ),
)


def impossible(tree: Mapping[str, Any]) -> str | None:
    """Explains the first invalid combination and its remedy, or returns None.

    Args:
        tree: Sections of a run file with every key of `CHOICES`.
    """
    for rule in RULES:
        (a, b), values = (rule.first[0], rule.second[0]), []
        for key, wanted in (rule.first, rule.second):
            section, leaf = key.split(".")
            value = tree[section][leaf]
            if value in wanted or (value and any(one is True for one in wanted)):  # 1 == True, but is not True
                values.append(value)
        if len(values) == 2:
            return (
                f"{a} {_words(values[0])} with {b} {_words(values[1])} is not possible: {rule.reason}; {rule.instead}"
            )
    return None


def _words(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
