"""A LoRA layer whose base and adapter are one step of autograd: fewer passes over memory than PEFT's four operations.

PEFT's own layer otherwise: same parameters, same names, same files. Used on GPUs, where adapters cost by the bytes
they move; dropout, several adapters and merged weights take PEFT's path.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear


class LoraFunction(torch.autograd.Function):
    """x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ, with gradients for x, A and B; W and bias are frozen.

    x: [..., in]; weight: [out, in]; a: [rank, in]; b: [out, rank]; all of one dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """[..., out]"""
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T
        out = torch.nn.functional.linear(flat, weight, bias)
        out.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad: [..., out]"""
        flat, low, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = torch.mm(grad, b).mul_(ctx.scaling)
        grad_b = torch.mm(grad.T, low).mul_(ctx.scaling)
        grad_a = torch.mm(grad_low.T, flat)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight).addmm_(grad_low, a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


class FusedLoraLinear(Linear):
    """PEFT's LoRA linear with `LoraFunction` where it applies."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: [..., in] → [..., out]."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        plain = name in self.lora_A and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or not x.is_cuda or name in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name], self.lora_B[name]
        if (
            b.bias is not None
            or not isinstance(self.lora_dropout[name], torch.nn.Identity)
            or a.weight.dtype != x.dtype
        ):
            return super().forward(x)
        base = self.get_base_layer()
        out: torch.Tensor = LoraFunction.apply(x, base.weight, base.bias, a.weight, b.weight, self.scaling[name])
        return out
