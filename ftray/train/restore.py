"""From a checkpoint to a model in one process, for evaluation and export. Knows checkpoints and models, no Ray."""

from __future__ import annotations

from typing import Any

from ftray import config
from ftray.errors import CheckpointError
from ftray.model.lora import build_model, trainable
from ftray.train.checkpoint import load_checkpoint
from ftray.train.timeline import Found


def load_tuned(run: config.Run, found: Found, precision: str) -> Any:
    """The tuned model on the CPU, in eval mode, its trained weights from the checkpoint's fp32 masters.

    precision: of the whole model; fp32 keeps the masters exact. Raises CheckpointError if the checkpoint doesn't fit.
    """
    model = build_model(run.model, run.method, precision, run.train.seed)
    state = load_checkpoint(found, "weights.")
    for name, parameter in trainable(model).items():
        saved = state.pop(f"weights.{name}", None)
        if saved is None or saved.shape != parameter.shape:
            raise CheckpointError(f"{found.uri} doesn't fit the model: {name} is missing or of another shape")
        parameter.data.copy_(saved)
    if left := list(state):
        raise CheckpointError(f"{found.uri} doesn't fit the model: it has {left[0]}, the model has not")
    return model.eval()
