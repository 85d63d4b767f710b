"""Private APIs of torch. Seen with torch 2.11 and 2.13; contract tests: tests/unit/test_compat.py."""

from __future__ import annotations

import torch


def use_expandable_segments() -> None:
    """Lets CUDA's allocator grow its segments, so that micro-batches of different lengths leave no fragments.

    Reason: the public setting is PYTORCH_CUDA_ALLOC_CONF, which is read before a Ray worker runs our code.
    """
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def norms(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The 2-norm of each tensor as a float32 scalar, in one kernel for all.

    Reason: `torch.nn.utils.get_total_norm` takes the norms of bf16 tensors in bf16.
    """
    norms: tuple[torch.Tensor, ...] = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return norms


def version_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the tensor that owns the memory, a count of its in-place changes).

    Reason: whether an activation is still the one that was quantized is not public: `_base` and `_version`.
    """
    owner = tensor if tensor._base is None else tensor._base
    return owner, owner._version


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, k] times weight [k, m], both int8, as int32.

    Reason: torch has no public product of int8 matrices on GPUs. n must be above 16; k and m divisible by 8.
    """
    return torch._int_mm(x, weight)


def fp8_product(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x [n, k] times weight [k, m], both float8, with scales [n, 1] and [1, m].

    Reason: the public `torch.nn.functional.scaled_mm` is newer than the oldest torch that ftray runs with (2.11).
    """
    out: torch.Tensor = torch._scaled_mm(x, weight, x_scale, scale, out_dtype=dtype, use_fast_accum=True)
    return out
