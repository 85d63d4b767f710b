"""From a checkpoint to a model in one process, for evaluation and export. Knows checkpoints and models, no Ray."""

from __future__ import annotations

from typing import Any

from ftray import config
from ftray.errors import CheckpointError, RunError
from ftray.model.lora import build_model, trainable
from ftray.train.checkpoint import load_checkpoint
from ftray.train.timeline import Found, list_checkpoints


def best_checkpoint(run_dir: str) -> Found:
    """The checkpoint with the best held-out loss, where losses were taken during training, else the newest.

    Raises RunError when there is none.
    """
    found = list_checkpoints(run_dir)
    if not found:
        raise RunError(f"{run_dir} has no checkpoint; train first: ftray train <run file>")
    best = found[0].progress.best
    return next((f for f in found if best and f.step == int(best["step"])), found[0])


def load_tuned(run: config.Run, found: Found, precision: str) -> Any:
    """The tuned model on the CPU, in eval mode, its trained weights from the checkpoint's fp32 masters.

    precision: of the whole model; fp32 keeps the masters exact. Raises CheckpointError if the checkpoint doesn't fit.
    """
    model = build_model(run.model, run.method, precision, run.train.seed)
    state = load_checkpoint(found)
    for name, parameter in trainable(model).items():
        saved = state.pop(f"weights.{name}", None)
        if saved is None or saved.shape != parameter.shape:
            raise CheckpointError(f"{found.uri} doesn't fit the model: {name} is missing or of another shape")
        parameter.data.copy_(saved)
    left = [name for name in state if name.startswith("weights.")]
    if left:
        raise CheckpointError(f"{found.uri} doesn't fit the model: it has {left[0]}, the model has not")
    return model.eval()
