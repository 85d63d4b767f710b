"""The section `method`: which weights are trained, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ftray.config.base import Float, Positive, Section


class MethodConfig(Section):
    """What is trained."""

    type: Literal["full", "lora", "qlora", "prompt-tuning"] = "lora"
    """`full`: every weight; `lora`: low-rank adapters on a frozen base; `qlora`: the same on a 4-bit (nf4) base;
    `prompt`: embeddings of virtual tokens in front of each record, on a frozen base."""
    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Annotated[Float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input while training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers get adapters: all but the output head, or the ends of their names."""
    rslora: bool = False
    """Scale adapters by alpha / √rank (rsLoRA), which keeps high ranks learning."""
    dora: bool = False
    """Learn the length of each weight row besides (DoRA): nearer to full fine-tuning, and slower."""
    num_virtual_tokens: Positive = 20
    """For `prompt`: virtual tokens in front of each record."""
    freeze: list[Annotated[str, Field(min_length=1)]] = Field([])
    """For `full`: what stays as it is: parts of parameters' names at their dots (`embed_tokens`, `model.layers.0`),
    `*` standing for any text in one part (`layers.*.mlp`)."""
    base_precision: Literal["fp8", "int8"] | None = None
    """The feed-forward layers' products, but the last block's, in 8 bits, for speed. `fp8` (GPUs from H100 on): of LoRA's
    frozen base, or with `full` of weights that stay in bf16; `int8` (from A100 on): of LoRA's frozen base. Left out:
    `train.precision`."""
