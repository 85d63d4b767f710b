"""The sections `train`, `deepspeed` and `checkpoint`: optimization, sharding, checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ftray.config.base import Float, Int, Positive, Section


class TrainConfig(Section):
    """Optimization."""

    epochs: Annotated[Float, Field(gt=0)] = 1.0
    """Passes over the data. With source weights: over the source that is largest relative to its weight."""
    max_steps: Positive | None = None
    """Optimizer steps; overrides epochs."""
    global_batch_size: Positive = 128
    """Packed sequences per optimizer step over all workers, whatever the number of workers."""
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Packed sequences per forward pass of a worker. `auto`: the fastest size that fits into GPU memory, 1 on CPU. A
    resumed run keeps its size if it fits."""
    learning_rate: Annotated[Float, Field(gt=0)] = 2e-4
    """Peak learning rate. Default for `method.type` full: 2e-05."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after warmup; cosine and linear reach 0 one step after the last."""
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps with a linear warmup. The first step has a rate above 0, so that it is not wasted."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"] = "adamw"
    """`adamw`: fp32 moments; `adamw-8bit`: moments in two bytes per weight, for full fine-tuning on few GPUs
    (`deepspeed.zero_stage` 0); `…-paged`: the same moments in host memory, fetched per weight during the update."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Share of the target probability that is spread over the vocabulary. The eval loss is computed without it."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of forward and backward; the optimizer always keeps fp32 master weights. fp16 (GPUs before Ampere) uses
    loss scaling, and skips steps while it finds the scale."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Seed of data order, adapter initialization and dropout."""
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Layers that recompute activations in the backward pass instead of storing them: `none`, every other
    (`selective`), or all (`full`). `auto`: as few as memory requires. Never changes the result."""
    max_bad_steps: Annotated[Int, Field(ge=0)] = 10
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""
    rewind_after: Positive | None = None
    """After this many bad steps in a row, weights and optimizer return to the newest checkpoint; training continues
    with the next data."""
    hang_timeout_s: Annotated[Float, Field(gt=0)] = 600.0
    """Seconds without a step after which workers count as hung and are restarted. Loading, compiling, saving and
    evaluating do not count."""


class DeepSpeedConfig(Section):
    """DeepSpeed settings. All others are derived."""

    zero_stage: Annotated[Int, Field(ge=0, le=3)] = 2
    """0: everything replicated, with ftray's own optimizer, the fastest if it fits; 1: sharded optimizer states; 2:
    also gradients; 3: also weights, from loading on."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Kept in host memory: nothing, optimizer states and master weights (stage 1 and up), or also weights (stage 3)."""
    overrides: dict[str, Any] = Field({})
    """Merged over the derived DeepSpeed config, for settings without a key here."""


class CheckpointConfig(Section):
    """Checkpoints."""

    every: Positive | str = 200
    """A number of steps (`200`), `1 epoch`, or `10 min`."""
    keep: Positive = 3
    """Number of newest checkpoints to keep, besides the best. From 2 up, a damaged checkpoint can be replaced by the
    one before."""

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
        """Epochs between checkpoints, if set in epochs."""
        if isinstance(self.every, str) and "epoch" in self.every:
            return float(self.every.split("epoch")[0])
        return None

    @property
    def every_s(self) -> float | None:
        """Seconds between checkpoints, if set as a time."""
        if isinstance(self.every, int) or self.every_epochs is not None:
            return None
        number, unit = re.fullmatch(r"([\d.]+) ?(s|min|h)", self.every).groups()  # type: ignore[union-attr]
        return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]
