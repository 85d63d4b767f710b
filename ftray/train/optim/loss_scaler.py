"""fp16 loss scaling: reads and restores the state of a DeepSpeed engine's scaler, and detects steps that only lower the scale.

DeepSpeed doubles the scale after a number of good steps. If gradients overflow, it halves the scale and skips the step.
"""

from __future__ import annotations

from typing import Any

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(engine: Any) -> Any:
    """The scaler of ZeRO's optimizers, or of the half-precision optimizer of stage 0; None in fp32."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def is_scaled(engine: Any) -> bool:
    """Whether the engine scales the loss dynamically, as in fp16."""
    scaler = _scaler(engine)
    return bool(getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False))


def prepare_scaling(engine: Any) -> None:
    """Keeps DeepSpeed from ending the process at the smallest scale; ftray counts bad steps instead."""
    if is_scaled(engine):
        _scaler(engine).raise_error_at_min_scale = False


def read_scale(engine: Any) -> dict[str, float] | None:
    """The scale and the counters of its next change, for the checkpoint; None without dynamic scaling."""
    if not is_scaled(engine):
        return None
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in FIELDS if hasattr(scaler, name)}


def restore_scale(engine: Any, state: dict[str, float] | None) -> None:
    """Restores the result of `read_scale`."""
    for name, value in (state or {}).items():
        setattr(_scaler(engine), name, value)


def lowered_scale(engine: Any, scale_before: dict[str, float] | None) -> bool:
    """Whether a skipped step lowered the scale: then the scale was the cause, not the data."""
    after = read_scale(engine)
    return after is not None and scale_before is not None and after["cur_scale"] < scale_before["cur_scale"]
