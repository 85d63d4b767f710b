"""Frozen linear layers in 8-bit floats, for LoRA on Hopper: half the arithmetic time of bf16 in the base's products.

A scale for each row of both operands (torch's rowwise scaled product); e4m3 throughout. The weight is kept twice, once
for the product and once transposed for the input's gradient, so that it takes the memory of bf16.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ftray.errors import ConfigError

E4M3_MAX = 448.0
ATTENTION = ("attn", "attention")  # in the names of what stays in bf16, a fifth of an 8B's arithmetic
CAPABILITY = (9, 0)  # of the first GPUs whose matrix units take rowwise scaled e4m3


class Fp8Linear(torch.nn.Module):
    """x Wᵀ + bias with W frozen in e4m3. `Frozen` of `lora_linear`, and a module with its own gradient besides.

    weight: e4m3 [out, in], scale fp32 [1, out]; transposed: e4m3 [in, out], scale fp32 [1, in].
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach())
        transposed, transposed_scale = quantize_rows(linear.weight.detach().T.contiguous())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale.T.contiguous(), persistent=False)
        self.register_buffer("transposed", transposed, persistent=False)
        self.register_buffer("transposed_scale", transposed_scale.T.contiguous(), persistent=False)
        self.bias = linear.bias

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] → [tokens, out]."""
        out = _scaled_product(*_shared_rows(x), self.weight, self.scale, x.dtype)
        return out if self.bias is None else out.add_(self.bias)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """[tokens, out] → [tokens, in]."""
        return _scaled_product(*quantize_rows(grad), self.transposed, self.transposed_scale, grad.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] → [..., out]; for adapters that take PEFT's path."""
        out: torch.Tensor = _Fp8Function.apply(x, self)
        return out


class _Fp8Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Fp8Linear) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.gradient(grad.reshape(-1, grad.shape[-1])).view(ctx.shape), None


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, width] → (e4m3 of the same shape, fp32 [rows, 1]) so that their product is x; a row's largest is 448."""
    if x.is_cuda:
        from ftray.model.fp8_kernels import quantize_rows as kernel

        return kernel(x)
    scale = (x.float().abs().amax(1, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


_last: tuple[Any, Any, tuple[torch.Tensor, torch.Tensor]] | None = None


def _shared_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of an activation, kept until the next: layers beside each other read the same one."""
    global _last
    whole = x if x._base is None else x._base
    what = (whole._version, x.data_ptr(), x.shape)
    if _last is None or _last[0]() is not whole or _last[1] != what:
        _last = (weakref.ref(whole), what, quantize_rows(x))
    return _last[2]


def _scaled_product(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x [tokens, k] times weight [n, k], both e4m3, transposed; scales [tokens, 1] and [1, n]."""
    if not x.is_cuda:
        return ((x.float() * x_scale) @ (weight.float() * scale.T).T).to(dtype)
    out: torch.Tensor = torch._scaled_mm(x, weight.T, x_scale, scale, out_dtype=dtype, use_fast_accum=True)
    return out


def check_fp8(device: torch.device) -> None:
    """Raises ConfigError where the matrix units don't take 8-bit floats."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ConfigError(
            f"method.base_precision fp8 needs a GPU of compute capability 9.0 (H100) or newer, this worker has {found}; "
            "leave it out"
        )


def quantize_base(model: torch.nn.Module, device: torch.device) -> int:
    """Replaces the base of each adapted linear layer by its fp8 form on the device; returns how many.

    A layer whose sides don't divide by 16 stays as it is: the scaled product doesn't take it. So do attention's, and all of
    the last block: what rounding these adds to the loss is far more than their share (docs/benchmarks.md).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    kept = set(blocks[-1].modules()) if blocks else set()
    count = 0
    for name, module in model.named_modules():
        base: Any = getattr(module, "base_layer", None)
        fits = type(base) is torch.nn.Linear and base.in_features % 16 == 0 and base.out_features % 16 == 0
        if fits and module not in kept and not any(word in name for word in ATTENTION):
            module.base_layer = Fp8Linear(base.to(device))
            count += 1
    return count
