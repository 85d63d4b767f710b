"""The sections of training: model, method, train, deepspeed, scale, checkpoint."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ftray.config.base import Float, Int, Positive, Section


class Model(Section):
    """The base model."""

    base: str = Field(min_length=1)
    """Hub id (`org/name`), a local directory, or `embedded:smollm2-135m-instruct`, the small model of the quickstart."""
    revision: str | None = None
    """Commit, tag or branch on the hub; pin a commit for runs that must be reproduced."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you say so here."""


class Method(Section):
    """What is trained."""

    type: Literal["full", "lora", "qlora"] = "lora"
    """`full`: every weight; `lora`: low-rank adapters on a frozen base; `qlora`: the same on a 4-bit (nf4) base."""
    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Annotated[Float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input while training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers get adapters: all but the output head, or the ends of their names."""
    base_precision: Literal["fp8"] | None = None
    """`fp8`: LoRA's frozen base in 8-bit floats, for speed; GPUs from H100 on. Left out:
    `train.precision`."""


class Train(Section):
    """Optimization."""

    epochs: Annotated[Float, Field(gt=0)] = 1.0
    """Passes over the data. Under weights: over the source that is largest relative to its weight."""
    max_steps: Positive | None = None
    """Optimizer steps; overrides epochs."""
    global_batch_size: Positive = 128
    """Packed rows in an optimizer step, over all workers; never changed by the number of workers."""
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Rows a worker computes at once; `auto`: on a GPU the number that is fastest within its memory, on a CPU 1."""
    learning_rate: Annotated[Float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at 0."""
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """`adamw`: moments in fp32; `adamw-8bit`: in two bytes a weight together, for full fine-tuning on few GPUs
    (`deepspeed.zero_stage` 0)."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of forward and backward; the optimizer always keeps fp32 masters."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Seeds data order, adapter initialization and dropout."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """Layers whose activations are computed again in backward instead of kept: `none`, every other (`selective`),
    or all (`full`); `auto`: as few as memory asks for. Never changes the result."""
    max_bad_steps: Annotated[Int, Field(ge=0)] = 10
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""


class DeepSpeed(Section):
    """DeepSpeed's settings; the rest is derived."""

    zero_stage: Annotated[Int, Field(ge=0, le=3)] = 2
    """0: all replicated, with ftray's own optimizer, the fastest where it fits; 1: optimizer states sharded; 2: and
    gradients; 3: and weights."""
    overrides: dict[str, Any] = Field({})
    """Merged over the derived DeepSpeed config, for what has no key here."""


class Scale(Section):
    """How many workers; never changes the result beyond rounding."""

    num_workers: Positive = 1
    """Training workers: one a GPU, or one a process on CPU."""
    accelerator: str | None = None
    """GPU kind as Ray names it (A100, H100, …); left out: any GPU where the cluster has one, else CPU."""
    cpus_per_worker: Annotated[Float, Field(gt=0)] = 1.0
    """CPUs a training worker reserves; on a CPU cluster also its number of threads."""


class CheckpointSection(Section):
    """Checkpoints."""

    every: Positive | str = 200
    """Steps (`200`), or `1 epoch`, or `10 min`."""
    keep: Positive = 3
    """How many of the newest stay; the best stays besides."""

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
