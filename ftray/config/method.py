"""The section `method`: full fine-tuning, LoRA, QLoRA, prompt tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ftray.config.base import Float, Positive, Section


class MethodConfig(Section):
    """Which weights are trained, and how."""

    type: Literal["full", "lora", "qlora", "prompt-tuning"] = "lora"
    """`full`: all weights; `lora`: low-rank adapters on a frozen base; `qlora`: LoRA on a 4-bit (nf4) base;
    `prompt-tuning`: embeddings of virtual tokens in front of each record, on a frozen base."""
    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Annotated[Float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input during training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear layers that get adapters: all except the output head, or a list of name suffixes."""
    rslora: bool = False
    """Scale adapters by alpha / √rank (rsLoRA), which keeps high ranks learning."""
    dora: bool = False
    """Also learn the magnitude of each weight vector (DoRA): closer to full fine-tuning, and slower."""
    num_virtual_tokens: Positive = 20
    """For `prompt-tuning`: virtual tokens in front of each record."""
    freeze: list[Annotated[str, Field(min_length=1)]] = Field([])
    """For `full`: parameters that stay frozen, as parts of their dotted names (`embed_tokens`, `model.layers.0`). `*`
    matches any text within one part (`layers.*.mlp`)."""
    base_precision: Literal["fp8", "int8"] | None = None
    """Compute the feed-forward matrix products of all blocks but the last in 8 bits, for speed. `fp8` (H100 and later):
    for LoRA's frozen base, or with `full` for weights stored in bf16. `int8` (A100 and later): for LoRA's frozen
    base. Default: `train.precision`."""
