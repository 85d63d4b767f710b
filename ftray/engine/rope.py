"""Which models have RoPE frequencies that depend on the longest sequence in the batch, and from which length on."""

from __future__ import annotations

from typing import Any


def steady_context(model_config: Any) -> int | None:
    """Number of positions within which a text's RoPE frequencies do not depend on other texts; None: no limit.

    With `longrope` and `dynamic` scaling, transformers uses the frequencies of the longest text for the whole batch.
    """
    text = model_config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            own = rope.get("original_max_position_embeddings")
            own = own or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
            return int(own)
    return None
