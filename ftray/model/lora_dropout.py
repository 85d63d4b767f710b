"""Dropout of LoRA's input as a pure function of a seed, so that backward computes the mask again instead of storing it.

PEFT stores a dropped copy of each layer's input and its mask. On an 8B model, that is 35 GiB and a tenth of the throughput
(micro-batch 4, sequences of 4,096 tokens). Here the products read the input once and drop elements on the way.
On GPUs, Triton kernels compute the same function (`lora_dropout_kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_RANK = 256  # of the kernels
WORD = 0xFFFFFFFF
ROW, COLUMN = 0x9E3779B1, 0xC2B2AE35
ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))  # Source: Wellons 2018, lowbias32
LAST_SHIFT = 16


@dataclass(frozen=True)
class SeededDropout:
    """Dropout with probability `p` of a matrix [tokens, in].

    An element is kept if a 32-bit hash of (seed, token, column) is at least `p` · 2³². Kept elements are scaled by 1 / (1 − p).
    """

    p: float
    seed: int

    @property
    def scale(self) -> float:
        """Factor of kept elements."""
        return 1 / (1 - self.p)

    @property
    def threshold(self) -> int:
        """The smallest hash of a kept element."""
        return int(self.p * 2**32)

    def mask(self, num_tokens: int, num_columns: int, device: torch.device) -> torch.Tensor:
        """bool [tokens, columns]: the elements that are kept."""
        rows = torch.arange(num_tokens, device=device)[:, None]
        columns = torch.arange(num_columns, device=device)[None]
        word = (rows * ROW + self.seed) & WORD
        word = ((word ^ (word >> 16)) * ROUNDS[0][1]) & WORD
        word = ((word ^ (word >> 13)) + columns * COLUMN) & WORD
        for shift, factor in ROUNDS:
            word = ((word ^ (word >> shift)) * factor) & WORD
        return (word ^ (word >> LAST_SHIFT)) >= self.threshold

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x with dropout, [tokens, in]."""
        return x * self.mask(x.shape[0], x.shape[1], x.device) * self.scale

    def project(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """dropout(x) Aᵀ: [tokens, in], [rank, in] → [tokens, rank]."""
        if x.is_cuda:
            from ftray.model import lora_dropout_kernels as kernels

            return kernels.project(x, a, self)
        return self.apply(x) @ a.T

    def gradient_of_a(self, grad_low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gradient of A: [tokens, rank], [tokens, in] → [rank, in]."""
        if x.is_cuda:
            from ftray.model import lora_dropout_kernels as kernels

            return kernels.gradient_of_a(grad_low, x, self)
        return torch.mm(grad_low.T, self.apply(x))

    def add_gradient_of_x(self, grad_x: torch.Tensor, grad_low: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Adds the gradient that reaches x through A to `grad_x` [tokens, in], in place; returns it."""
        if grad_x.is_cuda:
            from ftray.model import lora_dropout_kernels as kernels

            return kernels.add_gradient_of_x(grad_x, grad_low, a, self)
        return grad_x.add_(self.apply(torch.mm(grad_low, a)))
