"""Cross-entropy and its gradient for a token's logits in two passes over memory, as a Triton kernel. GPUs only; see `sft.py`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192


def softmax_slope_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses, fp32 [rows], of logits [rows, vocabulary] (contiguous); logits become their gradient in place.

    targets: int64 [rows]. Arithmetic in fp32 (online softmax, Milakov & Gimelshein 2018).
    """
    num_rows, vocabulary = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device):
        _slope[(num_rows,)](logits, targets, losses, vocabulary, logits.stride(0), BLOCK=BLOCK, num_warps=16)
    return losses


@triton.jit
def _slope(logits, targets, losses, vocabulary: tl.constexpr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    wanted = tl.load(logits + target).to(tl.float32)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for lo in range(0, vocabulary, BLOCK):
        at = lo + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher))
        top = higher
    tl.store(losses + row, top + tl.log(total) - wanted)
    for lo in range(0, vocabulary, BLOCK):
        at = lo + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        slope = tl.exp(x - top) / total - tl.where(at == target, 1.0, 0.0)
        tl.store(logits + at, slope.to(logits.dtype.element_ty), mask=at < vocabulary)
