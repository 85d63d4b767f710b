"""Attention over documents laid end to end. Knows kernels; nothing of rows, losses or training.

On a GPU: torch's variable-length flash attention over `cu_seq_lens`, registered with transformers as an attention
function, so that no extra package is needed. Elsewhere: sdpa, for which transformers builds a block-diagonal causal
mask from positions that restart.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

VARLEN = "ftray_varlen"


def choose_attention(model_config: Any) -> str:
    """Name of the attention function for a model on this machine's device, registered if it is ours."""
    softcap = getattr(model_config, "attn_logit_softcapping", None)
    if not torch.cuda.is_available() or softcap is not None or _varlen_attn() is None:
        return "sdpa"
    from transformers import AttentionInterface, AttentionMaskInterface

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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document. query: [1, heads, tokens, dim]; key, value: [1, kv_heads, tokens, dim].

    cu_seq_lens_q: int32 [documents + 1], begins of documents and the end; max_length_q: longest document. Without them
    the whole row is one document. Returns [1, tokens, heads, dim]. Raises ValueError for a batch of more than one.
    """
    del module, attention_mask  # transformers passes them; the lengths say it all
    if query.shape[0] != 1 or dropout:
        raise ValueError(f"varlen attention takes one row without dropout, got {tuple(query.shape)} and {dropout}")
    num_tokens = query.shape[2]
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.tensor([0, num_tokens], dtype=torch.int32, device=query.device)
        max_length_q = num_tokens
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
    out = attend(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
