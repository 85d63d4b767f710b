"""Triton kernels of `fp8.py`: quantization of rows and columns with a scale each, scaling of int8 sums. GPUs only."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS, ROWS = 32, 256  # of a tile of `quantize_columns`: 64 bytes of a row of bf16 at once


def quantize_rows(x: torch.Tensor, dtype: torch.dtype, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, width], rows contiguous → (codes [rows, width], fp32 [rows, 1])."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    num_rows, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    warps = 16 if block >= 16384 else 8 if block >= 4096 else 4
    is_whole = not dtype.is_floating_point
    with torch.cuda.device(x.device):
        _rows[(num_rows,)](x, out, scale, x.stride(0), width, largest, IS_WHOLE=is_whole, BLOCK=block, num_warps=warps)
    return out, scale


def quantize_columns(x: torch.Tensor, dtype: torch.dtype, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, width], rows contiguous → (codes [width, rows], fp32 [width, 1])."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    num_rows, width = x.shape
    out = torch.empty((width, num_rows), dtype=dtype, device=x.device)
    scale = torch.empty((width, 1), dtype=torch.float32, device=x.device)
    is_whole = not dtype.is_floating_point
    with torch.cuda.device(x.device):
        _columns[(triton.cdiv(width, COLUMNS),)](
            x,
            out,
            scale,
            x.stride(0),
            num_rows,
            width,
            largest,
            IS_WHOLE=is_whole,
            COLUMNS=COLUMNS,
            ROWS=ROWS,
            num_warps=8,
        )
    return out, scale


def scale_sums(sums: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int32 [m, n] times its rows' scales [m, 1] and its columns' [1, n]; contiguous."""
    m, n = sums.shape
    out = torch.empty((m, n), dtype=dtype, device=sums.device)
    block = min(2048, triton.next_power_of_2(n))
    with torch.cuda.device(sums.device):
        _scale[(m, triton.cdiv(n, block))](sums, rows, columns, out, n, BLOCK=block)
    return out


@triton.jit
def _code(values, IS_WHOLE: tl.constexpr):
    return tl.floor(values + 0.5) if IS_WHOLE else values


@triton.jit
def _rows(x, out, scale, stride, width, largest, IS_WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    size = tl.maximum(tl.max(tl.abs(values)) / largest, 1e-12)
    tl.store(scale + row, size)
    tl.store(out + row * width + at, _code(values / size, IS_WHOLE).to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _columns(
    x, out, scale, stride, num_rows, width, largest, IS_WHOLE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS).to(tl.int64)
    most = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, num_rows, ROWS):
        mask = (first + row < num_rows)[:, None] & (column < width)[None, :]
        values = tl.load(x + (first + row)[:, None] * stride + column[None, :], mask=mask, other=0.0)
        most = tl.maximum(most, tl.abs(values.to(tl.float32)))
    size = tl.maximum(tl.max(most, 0) / largest, 1e-12)
    tl.store(scale + column, size, mask=column < width)
    for first in range(0, num_rows, ROWS):
        mask = (first + row < num_rows)[:, None] & (column < width)[None, :]
        values = tl.load(x + (first + row)[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        codes = _code(values / size[None, :], IS_WHOLE).to(out.dtype.element_ty)
        tl.store(out + column[:, None] * num_rows + (first + row)[None, :], tl.trans(codes), mask=tl.trans(mask))


@triton.jit
def _scale(sums, rows, columns, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(sums + row * n + at, mask=at < n, other=0).to(tl.float32)
    values = values * tl.load(rows + row) * tl.load(columns + at, mask=at < n, other=0.0)
    tl.store(out + row * n + at, values.to(out.dtype.element_ty), mask=at < n)
