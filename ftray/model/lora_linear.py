"""LoRA layers that compute base and adapter in one autograd function, with fewer passes over memory than PEFT's four operations.

Parameters, names and files are PEFT's. Used on GPUs, where the cost of adapters is memory traffic; several adapters and merged
weights use PEFT's own forward. The frozen base is bf16, 4-bit or 8-bit. Dropout is a function of a seed (`lora_dropout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.lora import Linear

from ftray.model.fp8 import FrozenLinear
from ftray.model.lora_dropout import MAX_RANK, SeededDropout


class FrozenLayer(Protocol):
    """A frozen linear layer: its product, and the gradient of its input."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] → a new tensor [tokens, out], bias added."""

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the output [tokens, out] → a new tensor, of the input [tokens, in]."""


@dataclass(frozen=True)
class DenseLayer:
    """Unquantized weights [out, in]; read again in backward, where ZeRO-3 has gathered them again."""

    layer: Any

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """See FrozenLayer."""
        return torch.nn.functional.linear(x, self.layer.weight, self.layer.bias)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """See FrozenLayer."""
        return torch.mm(grad, self.layer.weight)


@dataclass(frozen=True)
class FourBitLayer:
    """A bitsandbytes layer; its weights are dequantized for each product."""

    layer: Any

    def _weight(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        whole: torch.Tensor = dequantize_4bit(self.layer.weight.data, self.layer.weight.quant_state)
        return whole

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """See FrozenLayer."""
        return torch.nn.functional.linear(x, self._weight(), self.layer.bias)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """See FrozenLayer."""
        return torch.mm(grad, self._weight())


class LoraFunction(torch.autograd.Function):
    """frozen(x) + scaling · (dropout(x) Aᵀ) Bᵀ, with gradients for x, A and B.

    Args:
        x: [..., in].
        frozen: The base layer.
        a: [rank, in].
        b: [out, rank].
        scaling: Factor of the adapter.
        dropout: None for none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        frozen: FrozenLayer,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout: SeededDropout | None = None,
    ) -> torch.Tensor:
        """[..., out]"""
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T if dropout is None else dropout.project(flat, a)
        out = frozen.product(flat)
        out.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(flat, low, a, b)
        ctx.frozen, ctx.scaling, ctx.dropout, ctx.shape = frozen, scaling, dropout, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad: [..., out]"""
        flat, low, a, b = ctx.saved_tensors
        dropout: SeededDropout | None = ctx.dropout
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = torch.mm(grad, b).mul_(ctx.scaling)
        grad_b = torch.mm(grad.T, low).mul_(ctx.scaling)
        grad_a = torch.mm(grad_low.T, flat) if dropout is None else dropout.gradient_of_a(grad_low, flat)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.frozen.gradient(grad)
            if dropout is None:
                grad_x.addmm_(grad_low, a)
            else:
                dropout.add_gradient_of_x(grad_x, grad_low, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_a, grad_b, None, None


def _fused(layer: Any, x: torch.Tensor, plain: bool) -> torch.Tensor | None:
    """`LoraFunction` for a PEFT layer's only adapter; None if PEFT's own forward is needed."""
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if not plain or name not in layer.lora_A or layer.disable_adapters or layer.merged:
        return None
    if not x.is_cuda or name in layer.lora_variant:
        return None
    a, b = layer.lora_A[name], layer.lora_B[name]
    p = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0  # Identity has no p
    if b.bias is not None or a.weight.dtype != x.dtype or (p and a.weight.shape[0] > MAX_RANK):
        return None
    # One draw of the CPU's generator, which the trainer seeds for each micro-batch.
    dropout = SeededDropout(p, int(torch.randint(2**31, ()))) if p else None
    frozen = _frozen(layer.get_base_layer())
    out: torch.Tensor = LoraFunction.apply(x, frozen, a.weight, b.weight, layer.scaling[name], dropout)
    return out


def _frozen(base: Any) -> FrozenLayer:
    if isinstance(base, FrozenLinear):
        return base
    return FourBitLayer(base) if hasattr(base.weight, "quant_state") else DenseLayer(base)


class FusedLoraLinear(Linear):
    """PEFT's LoRA linear layer with `LoraFunction` where it applies."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: [..., in] → [..., out]."""
        out = _fused(self, x, plain=not (args or kwargs))
        return super().forward(x, *args, **kwargs) if out is None else out


def fused_layers(four_bit: bool) -> dict[type, type]:
    """Class of a base layer → class of its adapter, for `register_layers`."""
    if not four_bit:
        return {torch.nn.Linear: FusedLoraLinear}
    import bitsandbytes
    from peft.tuners.lora import Linear4bit

    class FusedLoraLinear4bit(Linear4bit):
        """PEFT's LoRA layer over a 4-bit base with `LoraFunction` where it applies."""

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """x: [..., in] → [..., out]."""
            out = _fused(self, x, plain=not (args or kwargs))
            return super().forward(x, *args, **kwargs) if out is None else out

    return {bitsandbytes.nn.Linear4bit: FusedLoraLinear4bit}
