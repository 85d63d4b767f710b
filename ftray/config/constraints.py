"""Which settings go together: one table, carried out by `ftray check`, rendered into docs/compatibility.md, tried by tests.

What is not named here is possible: every pair of `CHOICES` that no rule excludes trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The settings that can exclude each other, by dotted key, with the values that tell them apart.
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
    """Two settings that exclude each other. `first` and `second` are (dotted key, values); True: any that is not empty."""

    first: tuple[str, tuple[Any, ...]]
    second: tuple[str, tuple[Any, ...]]
    reason: str
    instead: str


ADAPTERS_ONLY = "it changes how adapters are scaled, and there are none"
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
        "the base is frozen already",
        "use full, or remove freeze",
    ),
    Rule(
        ("method.base_precision", ("fp8", "int8")),
        ("method.type", ("qlora", "prompt-tuning")),
        "only LoRA's base and fully trained weights are multiplied in 8 bits",
        "use lora or full, or remove base_precision",
    ),
    Rule(
        ("method.base_precision", ("int8",)),
        ("method.type", ("full",)),
        "only a frozen base is multiplied in int8",
        "use lora, or fp8, or remove base_precision",
    ),
    Rule(
        ("method.base_precision", ("fp8", "int8")),
        ("train.precision", ("fp16", "fp32")),
        "its products give bf16",
        "use bf16, or remove base_precision",
    ),
    Rule(
        ("method.base_precision", ("fp8", "int8")),
        ("method.dora", (True,)),
        "DoRA computes with the base's weights themselves",
        "remove one of them",
    ),
    Rule(
        ("method.base_precision", ("fp8", "int8")),
        ("deepspeed.zero_stage", (3,)),
        "products in 8 bits don't take sharded weights",
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
        "sharded states are moved by DeepSpeed",
        "use zero_stage 0, or adamw with offload optimizer",
    ),
    Rule(
        ("train.precision", ("fp16",)),
        ("deepspeed.zero_stage", (0,)),
        "DeepSpeed doesn't scale the loss there",  # 0.19.8: its backward does so for ZeRO's optimizers only
        "use zero_stage 1",
    ),
    Rule(
        ("deepspeed.offload", ("optimizer",)),
        ("deepspeed.zero_stage", (0,)),
        "DeepSpeed moves sharded states only",
        "use zero_stage 1, 2 or 3, or optimizer adamw-paged",
    ),
    Rule(
        ("deepspeed.offload", ("all",)),
        ("deepspeed.zero_stage", (0, 1, 2)),
        "only sharded weights can live in the host's memory",
        "use zero_stage 3, or offload optimizer",
    ),
)


def impossible(tree: Mapping[str, Any]) -> str | None:
    """Why settings exclude each other and what to do instead, as a sentence; None for settings that go together.

    tree: sections of a run file with every key of `CHOICES`.
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
