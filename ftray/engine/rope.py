"""Rotary frequencies that depend on what stands beside a text: of which models, and up to where they don't."""

from __future__ import annotations

from typing import Any


def steady_context(model_config: Any) -> int | None:
    """Positions within which a text's frequencies are its own; None where they always are.

    Of `longrope` and `dynamic` scaling transformers takes those of the longest text of a batch or row for all of it.
    """
    text = model_config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            own = rope.get("original_max_position_embeddings")
            own = own or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
            return int(own)
    return None
