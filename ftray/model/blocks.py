"""A model's blocks: what is recomputed, gathered and quantized as one. Knows transformers' modules."""

from __future__ import annotations

from typing import Any


def layers_of(model: Any) -> dict[str, Any]:
    """Blocks by name, in the model's order; none where a model isn't built of transformers' own."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
