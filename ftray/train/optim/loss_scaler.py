"""Loss scaling of fp16: its state out of and into a DeepSpeed engine, and whether a skipped step only searched the scale.

DeepSpeed doubles the scale after a row of good steps and halves it when gradients overflow, skipping that step.
"""

from __future__ import annotations

from typing import Any

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(engine: Any) -> Any:
    """What holds the scale: of ZeRO's optimizers, or of the half-precision optimizer of stage 0; None in fp32."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def is_scaled(engine: Any) -> bool:
    """Whether the engine scales the loss dynamically, as in fp16."""
    scaler = _scaler(engine)
    return bool(getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False))


def prepare_scaling(engine: Any) -> None:
    """At its smallest scale DeepSpeed would end the process; we count bad steps instead."""
    if is_scaled(engine):
        _scaler(engine).raise_error_at_min_scale = False


def read_scale(engine: Any) -> dict[str, float] | None:
    """The scale and what its next changes depend on, for the checkpoint; None without dynamic scaling."""
    if not is_scaled(engine):
        return None
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in FIELDS if hasattr(scaler, name)}


def restore_scale(engine: Any, state: dict[str, float] | None) -> None:
    """Puts back what `read_scale` gave."""
    for name, value in (state or {}).items():
        setattr(_scaler(engine), name, value)


def searches_scale(engine: Any, scale_before: dict[str, float] | None) -> bool:
    """Whether a step that was skipped lowered the scale: then the scale was at fault, not the data."""
    after = read_scale(engine)
    return after is not None and scale_before is not None and after["cur_scale"] < scale_before["cur_scale"]
