"""Attention over a paged cache for models that soft-cap their scores (Gemma 2); transformers' paged attentions ignore the cap.

It replaces transformers' `paged|eager`, which still handles calls without a cap.
"""

from __future__ import annotations

from typing import Any

import torch

PAGED = "paged|eager"  # the one name besides sdpa and flash attention that continuous batching takes


def caps_scores(model_config: Any) -> bool:
    """Whether a model's attention scores are soft-capped."""
    return getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None


def use_capped() -> None:
    """Registers the capping attention as PAGED in this process."""
    from transformers import AttentionInterface

    AttentionInterface.register(PAGED, paged_attention)


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the signature of transformers' own.

    Args:
        query: [1, heads, tokens, dim].
        key: [1, heads, tokens, dim], added to `cache`.
        value: As key.
        attention_mask: Additive.
        softcap: Scores s become softcap · tanh(s / softcap), before the mask.

    Returns:
        [1, tokens, heads, dim].
    """
    if softcap is None:
        from transformers.integrations.eager_paged import eager_paged_attention_forward

        usual: tuple[torch.Tensor, torch.Tensor | None] = eager_paged_attention_forward(
            module, query, key, value, attention_mask, scaling, **more
        )
        return usual
    cache = more.pop("cache")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=more)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap)) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (shares @ value).transpose(1, 2).contiguous(), None
