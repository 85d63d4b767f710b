"""The sections `train`, `deepspeed` and `checkpoint`: optimization, sharding, checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ftray.config.base import Float, Int, Positive, Section


class TrainConfig(Section):
    """Optimization."""

    epochs: Annotated[Float, Field(gt=0)] = 1.0
    """Passes over the data. Under weights: over the source that is largest relative to its weight."""
    max_steps: Positive | None = None
    """Optimizer steps; overrides epochs."""
    global_batch_size: Positive = 128
    """Packed rows in an optimizer step, over all workers; never changed by the number of workers."""
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Rows a worker computes at once; `auto`: on a GPU the number that is fastest within its memory, on a CPU 1. A run
    that is continued keeps its number where it fits."""
    learning_rate: Annotated[Float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at 0."""
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"] = "adamw"
    """`adamw`: moments in fp32; `adamw-8bit`: in two bytes a weight together, for full fine-tuning on few GPUs
    (`deepspeed.zero_stage` 0); `…-paged`: the same moments in the host's memory, each weight's fetched for its update."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's weight that is spread over the whole vocabulary; the held-out loss is without it."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of forward and backward; the optimizer always keeps fp32 masters. fp16 (GPUs before Ampere) scales
    the loss, and skips steps while it searches the scale."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Seeds data order, adapter initialization and dropout."""
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Layers whose activations are computed again in backward instead of kept: `none`, every other (`selective`),
    or all (`full`); `auto`: as few as memory asks for. Never changes the result."""
    max_bad_steps: Annotated[Int, Field(ge=0)] = 10
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""
    rewind_after: Positive | None = None
    """So many of these in a row put weights and optimizer back to the newest checkpoint; training goes on at the next rows."""
    hang_timeout_s: Annotated[Float, Field(gt=0)] = 600.0
    """Seconds without a step after which workers count as stuck and are started anew. Loading, compiling, saving and
    evaluating don't count."""


class DeepSpeedConfig(Section):
    """DeepSpeed's settings; the rest is derived."""

    zero_stage: Annotated[Int, Field(ge=0, le=3)] = 2
    """0: all replicated, with ftray's own optimizer, the fastest where it fits; 1: optimizer states sharded; 2: and
    gradients; 3: and weights, from loading on."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in the host's memory: nothing, the optimizer's states and masters (stage 1 and up), or weights too
    (stage 3)."""
    overrides: dict[str, Any] = Field({})
    """Merged over the derived DeepSpeed config, for what has no key here."""


class CheckpointConfig(Section):
    """Checkpoints."""

    every: Positive | str = 200
    """Steps (`200`), or `1 epoch`, or `10 min`."""
    keep: Positive = 3
    """How many of the newest stay, from 2 up also as a way back should the newest be damaged; the best stays besides."""

    @field_validator("every", mode="before")
    @classmethod
    def _every_reads(cls, value: object) -> object:
        text = re.fullmatch(r"(\d+(?:\.\d+)?) ?(epochs?|s|min|h)", value) if isinstance(value, str) else None
        number = float(text[1]) if text else value if isinstance(value, int) and not isinstance(value, bool) else 0
        if number <= 0:
            raise ValueError("must be a number of steps from 1 up, or like '1 epoch', '10 min', '2 h'")
        return value

    @property
    def every_epochs(self) -> float | None:
        """Epochs between checkpoints, where the key says epochs."""
        if isinstance(self.every, str) and "epoch" in self.every:
            return float(self.every.split("epoch")[0])
        return None

    @property
    def every_s(self) -> float | None:
        """Seconds between checkpoints, where the key says a time."""
        if isinstance(self.every, int) or self.every_epochs is not None:
            return None
        number, unit = re.fullmatch(r"([\d.]+) ?(s|min|h)", self.every).groups()  # type: ignore[union-attr]
        return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]
