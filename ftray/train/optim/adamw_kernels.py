"""AdamW's update as one Triton kernel, which reads and writes each state once; small parameters share a launch. GPUs only.

The same arithmetic as `adamw.py`, per element in fp32; equal within float32 rounding (tests/gpu).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 2048


def update(
    p: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    group: dict[str, Any],
    clip: float,
    step: int,
    size: int | None,
) -> None:
    """Updates one parameter in place. size: Elements that share a scale in 8-bit moments; None for fp32 moments."""
    n = p.numel()
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    rest = state.get("rest", p)
    factors, options = _factors(group, step)
    numbers = (n, clip, *factors)
    options["SPLIT"] = "rest" in state
    with torch.cuda.device(p.device):
        if size is None:
            _update[(triton.cdiv(n, BLOCK),)](p, rest, grad, mean, square, *numbers, **options, BLOCK=BLOCK)
        else:
            scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"])
            salt = (step * 0x85EBCA77) & 0xFFFFFFFF
            salt = salt - 2**32 if salt >= 2**31 else salt
            _update_8bit[(triton.cdiv(n, BLOCK),)](
                p, rest, grad, mean, square, *scales, salt, *numbers, **options, SIZE=size, ROWS=BLOCK // size
            )


def update_many(
    parameters: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]],
    group: dict[str, Any],
    clip: float,
    step: int,
) -> None:
    """Updates (parameter, gradient, state) in place, with fp32 moments: one launch per dtype."""
    for dtype in (torch.bfloat16, torch.float32):
        chosen = [(p, g.to(dtype).contiguous(), s) for p, g, s in parameters if p.dtype == dtype]
        if not chosen:
            continue
        device, blocks = chosen[0][0].device, [triton.cdiv(p.numel(), BLOCK) for p, _, _ in chosen]
        first, table = 0, []
        for (p, g, s), count in zip(chosen, blocks, strict=True):
            tensors = (p, s.get("rest", p), g, s["exp_avg"], s["exp_avg_sq"])
            table.append([*(t.data_ptr() for t in tensors), p.numel(), first])
            first += count
        owners = torch.repeat_interleave(torch.arange(len(chosen), dtype=torch.int32), torch.tensor(blocks))
        places = torch.tensor(table, dtype=torch.int64).to(device)
        factors, options = _factors(group, step)
        split = dtype == torch.bfloat16
        with torch.cuda.device(device):
            _update_many[(first,)](places, owners.to(device), clip, *factors, **options, SPLIT=split, BLOCK=BLOCK)


def _factors(group: dict[str, Any], step: int) -> tuple[tuple[float, ...], dict[str, Any]]:
    """The factors of a step, and the constants that are compiled in."""
    beta1, beta2 = group["betas"]
    rate = group["lr"] / (1 - beta1**step)
    keep = 1 - group["lr"] * group["weight_decay"]
    root = (1 - beta2**step) ** -0.5
    return (rate, keep, root, group["eps"]), {"BETA1": beta1, "BETA2": beta2}


@triton.jit
def _apply(p, rest, at, inside, mean, square, rate, keep, root, eps, SPLIT: tl.constexpr):
    """Updates the master weight, which is read from and written to (p, rest)."""
    if SPLIT:
        high = tl.load(p + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
        master = (high + tl.load(rest + at, mask=inside, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        master = tl.load(p + at, mask=inside, other=0.0)
    master = master * keep - rate * (mean / (tl.sqrt(square) * root + eps))
    if SPLIT:
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(p + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(rest + at, (bits - (high << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(p + at, master, mask=inside)


@triton.jit
def _one(
    p, rest, grad, mean_at, square_at, at, inside, clip, rate, keep, root, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * clip
    mean = tl.load(mean_at + at, mask=inside, other=0.0)
    square = tl.load(square_at + at, mask=inside, other=0.0)
    mean = mean + (g - mean) * (1.0 - BETA1)
    square = square * BETA2 + g * g * (1.0 - BETA2)
    tl.store(mean_at + at, mean, mask=inside)
    tl.store(square_at + at, square, mask=inside)
    _apply(p, rest, at, inside, mean, square, rate, keep, root, eps, SPLIT)


@triton.jit
def _update(
    p, rest, grad, mean_at, square_at, n, clip, rate, keep, root, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _one(p, rest, grad, mean_at, square_at, at, at < n, clip, rate, keep, root, eps, BETA1, BETA2, SPLIT)


@triton.jit
def _update_many(
    places, owners, clip, rate, keep, root, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # places: for each parameter the addresses of its five tensors, its size, its first block
    place = places + tl.load(owners + tl.program_id(0)) * 7
    own = tl.bfloat16 if SPLIT else tl.float32
    low = tl.int16 if SPLIT else tl.float32
    p = tl.load(place).to(tl.pointer_type(own))
    rest = tl.load(place + 1).to(tl.pointer_type(low))
    grad = tl.load(place + 2).to(tl.pointer_type(own))
    mean_at = tl.load(place + 3).to(tl.pointer_type(tl.float32))
    square_at = tl.load(place + 4).to(tl.pointer_type(tl.float32))
    at = (tl.program_id(0) - tl.load(place + 6)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(place + 5)
    _one(p, rest, grad, mean_at, square_at, at, inside, clip, rate, keep, root, eps, BETA1, BETA2, SPLIT)


@triton.jit
def _update_8bit(
    p, rest, grad, mean_at, square_at, mean_scale, square_scale, salt, n, clip, rate, keep, root, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr, SPLIT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside, known = at < n, row * SIZE < n
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * clip
    y = tl.load(mean_at + at, mask=inside, other=0).to(tl.float32) / 127
    mean = y / (2 - tl.abs(y)) * tl.load(mean_scale + row, mask=known, other=0.0)[:, None]
    u = tl.load(square_at + at, mask=inside, other=0).to(tl.float32)
    u = u * (tl.load(square_scale + row, mask=known, other=0.0) / 255)[:, None]
    square = (u * u) * (u * u)
    mean = mean + (g - mean) * (1.0 - BETA1)
    square = square * BETA2 + g * g * (1.0 - BETA2)

    scale = tl.max(tl.abs(mean), 1)
    x = mean / tl.maximum(scale, 1e-30)[:, None]
    code = 254 * x / (1 + tl.abs(x))
    code = tl.where(code < 0, code - 0.5, code + 0.5).to(tl.int32).to(tl.int8)
    tl.store(mean_at + at, code, mask=inside)
    tl.store(mean_scale + row, scale, mask=known)

    u = tl.sqrt(tl.sqrt(square))
    top = tl.max(u, 1)
    y = 255 * u / tl.maximum(top, 1e-30)[:, None]
    h = at.to(tl.int32).to(tl.uint32, bitcast=True) * 0x9E3779B1 + salt.to(tl.int32).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    up = tl.minimum(tl.floor(y + (h >> 8).to(tl.float32) / 16777216.0), 255.0)
    up = tl.where(y > 0, tl.maximum(up, 1.0), up)
    tl.store(square_at + at, up.to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(square_scale + row, top, mask=known)
    _apply(p, rest, at, inside, mean, square, rate, keep, root, eps, SPLIT)
