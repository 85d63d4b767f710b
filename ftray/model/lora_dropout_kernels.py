"""Triton kernels of `SeededDropout`: products that drop elements of the large operand as they read it.

Each kernel is bound by memory: it reads [tokens, in] once. The sum over tokens in `gradient_of_a` has a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from ftray.model.lora_dropout import SeededDropout

TOKENS, COLUMNS = 64, 128  # of a tile
NUM_PARTS = 8  # parts of the tokens that `gradient_of_a` sums separately


@triton.jit
def _keep(seed, rows, columns, threshold):
    """bool [rows, columns]; see `SeededDropout.mask`."""
    word = rows.to(tl.uint32)[:, None] * 0x9E3779B1 + seed.to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 13)) + columns.to(tl.uint32)[None, :] * 0xC2B2AE35
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return (word ^ (word >> 16)) >= threshold.to(tl.uint32)


@triton.jit
def _load(pointer, rows, columns, num_rows, num_columns):
    """A tile of a matrix in row-major order, zero outside."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _project_kernel(
    x_ptr, a_ptr, out_ptr, num_tokens, num_columns, rank, seed, threshold, scale,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for start in range(0, num_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = _load(x_ptr, rows, columns, num_tokens, num_columns)
        a = _load(a_ptr, ranks, columns, rank, num_columns)
        x = tl.where(_keep(seed, rows, columns, threshold), x, 0.0).to(a.dtype)
        total += tl.dot(x, tl.trans(a), input_precision="ieee")
    inside = (rows < num_tokens)[:, None] & (ranks < rank)[None, :]
    places = rows.to(tl.int64)[:, None] * rank + ranks[None, :]
    tl.store(out_ptr + places, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of_a_kernel(
    grad_ptr, x_ptr, out_ptr, num_tokens, num_columns, rank, per_part, seed, threshold, scale,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    end = tl.minimum((part + 1) * per_part, num_tokens)
    for start in range(part * per_part, end, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        grad = _load(grad_ptr, rows, ranks, end, rank)
        x = _load(x_ptr, rows, columns, end, num_columns)
        x = tl.where(_keep(seed, rows, columns, threshold), x, 0.0).to(grad.dtype)
        total += tl.dot(tl.trans(grad), x, input_precision="ieee")
    inside = (ranks < rank)[:, None] & (columns < num_columns)[None, :]
    places = (part * rank + ranks)[:, None].to(tl.int64) * num_columns + columns[None, :]
    tl.store(out_ptr + places, total * scale, mask=inside)


@triton.jit
def _add_gradient_of_x_kernel(
    out_ptr, grad_ptr, a_ptr, num_tokens, num_columns, rank, seed, threshold, scale,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    grad = _load(grad_ptr, rows, ranks, num_tokens, rank)
    a = _load(a_ptr, ranks, columns, rank, num_columns)
    added = tl.dot(grad, a, input_precision="ieee") * scale
    added = tl.where(_keep(seed, rows, columns, threshold), added, 0.0)
    inside = (rows < num_tokens)[:, None] & (columns < num_columns)[None, :]
    places = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    total = tl.load(places, mask=inside, other=0.0).to(tl.float32) + added
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=inside)


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def project(x: torch.Tensor, a: torch.Tensor, dropout: SeededDropout) -> torch.Tensor:
    """See `SeededDropout.project`."""
    x, a = x.contiguous(), a.contiguous()
    (num_tokens, num_columns), rank = x.shape, a.shape[0]
    out = torch.empty(num_tokens, rank, dtype=x.dtype, device=x.device)
    _project_kernel[(triton.cdiv(num_tokens, TOKENS),)](
        x, a, out, num_tokens, num_columns, rank, dropout.seed, dropout.threshold, dropout.scale,
        TOKENS, COLUMNS, _padded(rank), num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def gradient_of_a(grad_low: torch.Tensor, x: torch.Tensor, dropout: SeededDropout) -> torch.Tensor:
    """See `SeededDropout.gradient_of_a`."""
    grad_low, x = grad_low.contiguous(), x.contiguous()
    (num_tokens, num_columns), rank = x.shape, grad_low.shape[1]
    per_part = triton.cdiv(triton.cdiv(num_tokens, NUM_PARTS), TOKENS) * TOKENS
    parts = torch.empty(NUM_PARTS, rank, num_columns, dtype=torch.float32, device=x.device)
    _gradient_of_a_kernel[(triton.cdiv(num_columns, COLUMNS), NUM_PARTS)](
        grad_low, x, parts, num_tokens, num_columns, rank, per_part, dropout.seed, dropout.threshold, dropout.scale,
        TOKENS, COLUMNS, _padded(rank), num_warps=4, num_stages=4,
    )  # fmt: skip
    return parts.sum(dim=0).to(x.dtype)


def add_gradient_of_x(
    grad_x: torch.Tensor, grad_low: torch.Tensor, a: torch.Tensor, dropout: SeededDropout
) -> torch.Tensor:
    """See `SeededDropout.add_gradient_of_x`. grad_x: contiguous."""
    grad_low, a = grad_low.contiguous(), a.contiguous()
    (num_tokens, num_columns), rank = grad_x.shape, a.shape[0]
    _add_gradient_of_x_kernel[(triton.cdiv(num_tokens, TOKENS), triton.cdiv(num_columns, COLUMNS))](
        grad_x, grad_low, a, num_tokens, num_columns, rank, dropout.seed, dropout.threshold, dropout.scale,
        TOKENS, COLUMNS, _padded(rank), num_warps=4,
    )  # fmt: skip
    return grad_x
