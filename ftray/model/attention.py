"""Attention over packed documents.

On GPUs: torch's variable-length flash attention over `cu_seq_lens`, registered with transformers as an attention function, so
that no extra package is needed. On CPUs: sdpa, for which transformers builds a block-diagonal causal mask from positions that
restart. Options that a model passes to its attention are applied or rejected, never ignored: soft-capped scores (Gemma 2) are
computed document by document, where transformers' sdpa would silently leave them uncapped.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ftray.compat.transformers import attention_support, causal_class
from ftray.errors import ModelError

VARLEN = "ftray_varlen"
IGNORED = {  # arguments of models to their attention that change nothing here
    "cache_position",
    "cu_seq_lens_k",
    "is_causal",
    "max_length_k",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


def choose_attention(model_config: Any) -> str:
    """Name of the attention function for a model on this machine's device; registers ftray's if it is chosen."""
    from transformers import AttentionInterface, AttentionMaskInterface

    takes_sdpa, takes_registered = attention_support(causal_class(model_config))
    caps = getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None
    default = "eager" if caps or not takes_sdpa else "sdpa"
    if not torch.cuda.is_available() or not (takes_sdpa and takes_registered) or _varlen_attn() is None:
        return default
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, _no_mask)
    return VARLEN


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document.

    Args:
        module: The attention layer.
        query: [1, heads, tokens, dim].
        key: [1, kv_heads, tokens, dim].
        value: [1, kv_heads, tokens, dim].
        attention_mask: Must be None.
        scaling: Factor of the scores.
        dropout: Must be 0.
        sliding_window: Tokens that a token attends to.
        cu_seq_lens_q: int32 [documents + 1]; starts of the documents, and the end. Without it there is one document.
        max_length_q: Tokens of the longest document.
        softcap: Soft cap of the scores.
        **more: Further options of the model.

    Returns:
        [1, tokens, heads, dim] and None.

    Raises:
        ValueError: The batch has more than one sequence, or there is dropout.
        ModelError: The model passes an option that is not supported.
    """
    unsupported = [name for name, value in more.items() if value is not None and name not in IGNORED]
    if attention_mask is not None:  # ftray passes none: the model made one itself
        unsupported.append("attention_mask")
    if unsupported:
        raise ModelError(
            f"{type(module).__name__} passes {unsupported[0]} to its attention, which ftray does not support on GPUs; use "
            "another base"
        )
    if query.shape[0] != 1 or dropout:
        raise ValueError(
            f"varlen attention takes one packed sequence without dropout, got {tuple(query.shape)} and {dropout}"
        )
    num_tokens = query.shape[2]
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.tensor([0, num_tokens], dtype=torch.int32, device=query.device)
        max_length_q = num_tokens
    if softcap is not None:
        left = num_tokens if sliding_window is None else sliding_window
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return capped_attention(query, key, value, cu_seq_lens_q, scale, softcap, left), None
    return _flash_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """torch's kernel; arguments and result as in `varlen_attention`."""
    attend = _varlen_attn()
    assert attend is not None
    left = -1 if sliding_window is None else sliding_window - 1
    known = inspect.signature(attend).parameters  # torch 2.10 had is_causal, 2.11 has window_size, 2.12 enable_gqa
    options: dict[str, Any] = {"scale": scaling}
    options |= {"window_size": (left, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    elif query.shape[1] != key.shape[1] and "window_size" not in known:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # x[0] would copy in backward
    out = attend(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, **options)
    result: torch.Tensor = out[None]
    return result


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    """`varlen_attention` with scores s capped to softcap · tanh(s / softcap).

    Documents are computed one after the other, and scores again in backward, so that memory holds one document's at a time.

    Args:
        query: [1, heads, tokens, dim].
        key: [1, kv_heads, tokens, dim].
        value: [1, kv_heads, tokens, dim].
        cu_seqlens: int32 [documents + 1].
        scale: Factor of the scores.
        softcap: Their cap.
        window: Tokens that a token attends to, including itself.

    Source:
        Gemma Team 2024, Gemma 2.
    """
    bounds = cu_seqlens.tolist()
    pieces = []
    for lo, hi in pairwise(bounds):
        parts = (x[:, :, lo:hi] for x in (query, key, value))
        pieces.append(checkpoint(_capped, *parts, scale, softcap, window, use_reentrant=False))
    return torch.cat(pieces, dim=1)


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float, window: int
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    at = torch.arange(query.shape[2], device=query.device)
    behind = at[:, None] - at[None]
    scores = scores.masked_fill((behind < 0) | (behind >= window), float("-inf"))
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (shares @ value).transpose(1, 2)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
