"""Linear layers computed in 8 bits, which takes half the time of bf16 in a GPU's matrix units.

Two formats: `fp8` (e4m3) on Hopper, `int8` on Ampere, with a scale for each row of both operands. A frozen base keeps its weights
in 8 bits twice, as they are for the product and transposed for the input's gradient, so that they take the memory of bf16. Where
int8 cannot represent the outliers of an input, the product stays in bf16. A trained weight stays in bf16 and is quantized for
each product; its own gradient is computed in bf16.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ftray import config
from ftray.compat.torch import fp8_product, int8_product, version_of
from ftray.errors import ConfigError
from ftray.model.families import family_of
from ftray.model.families.base import layers_of

SIDES = 16  # 8-bit products need dimensions that are multiples of this
MIN_ROWS = 17  # of an operand of torch's int8 product


@dataclass(frozen=True)
class NumberFormat:
    """An 8-bit number format.

    Attributes:
        name: Value of `method.base_precision`.
        dtype: torch's dtype.
        largest: Largest value of a row after scaling.
        capability: CUDA compute capability of the first GPUs with this format.
        card: The first of these GPUs.
    """

    name: str
    dtype: torch.dtype
    largest: float
    capability: tuple[int, int]
    card: str


FP8 = NumberFormat("fp8", torch.float8_e4m3fn, 448.0, (9, 0), "H100")
INT8 = NumberFormat("int8", torch.int8, 127.0, (8, 0), "A100")
FORMATS = {each.name: each for each in (FP8, INT8)}


class FrozenLinear(torch.nn.Module):
    """x Wᵀ + bias with W frozen in 8 bits: a `FrozenLayer` of `lora_linear`, and a module with its own gradient.

    Buffers: weight [out, in], scale fp32 [1, out]; transposed [in, out], transposed_scale fp32 [1, in]. With int8, the weight of
    a layer that narrows stays in its own dtype, without a scale: its inputs, gated products, have outliers
    (docs/benchmarks.md).
    """

    def __init__(self, linear: torch.nn.Linear, format: NumberFormat) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = linear.in_features, linear.out_features, format
        weight: torch.Tensor = linear.weight.detach()
        transposed, transposed_scale = quantize_columns(weight, format)
        scale = None
        if format is FP8 or self.in_features <= self.out_features:
            weight, scales = quantize_rows(weight, format)
            scale = scales.T.contiguous()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("transposed", transposed, persistent=False)
        self.register_buffer("transposed_scale", transposed_scale.T.contiguous(), persistent=False)
        self.bias = linear.bias

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] → [tokens, out]."""
        if self.scale is None:
            return torch.nn.functional.linear(x, self.weight, self.bias)
        out = _scaled_product(*_shared_rows(x, self.format), self.weight, self.scale, x.dtype)
        return out if self.bias is None else out.add_(self.bias)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """[tokens, out] → [tokens, in]."""
        rows = quantize_rows(grad, self.format)
        return _scaled_product(*rows, self.transposed, self.transposed_scale, grad.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] → [..., out]; for adapters that use PEFT's own forward."""
        out: torch.Tensor = _FrozenFunction.apply(x, self)
        return out


class _FrozenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.gradient(grad.reshape(-1, grad.shape[-1])).view(ctx.shape), None


class TrainedLinear(torch.nn.Linear):
    """x Wᵀ + bias with W trained; product and input gradient in fp8. It shares the parameters of the layer it replaces."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] → [..., out]."""
        out: torch.Tensor = _TrainedFunction.apply(x, self.weight)
        return out if self.bias is None else out + self.bias


class _TrainedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, weight)
        ctx.shape = x.shape
        codes, scale = quantize_rows(weight, FP8)
        return _scaled_product(*_shared_rows(flat, FP8), codes, scale.T, x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        flat, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            codes, scale = quantize_columns(weight, FP8)
            grad_x = _scaled_product(*quantize_rows(grad, FP8), codes, scale.T, grad.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mm(grad.T, flat)
        return grad_x, grad_weight


def quantize_rows(x: torch.Tensor, format: NumberFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, width] → (codes of the same shape, fp32 [rows, 1]) so that their product is x."""
    if x.is_cuda:
        from ftray.model.fp8_kernels import quantize_rows as kernel

        return kernel(x, format.dtype, format.largest)
    scale = (x.float().abs().amax(1, keepdim=True) / format.largest).clamp_min(1e-12)
    codes = x.float() / scale
    return (codes if format.dtype.is_floating_point else (codes + 0.5).floor()).to(format.dtype), scale


def quantize_columns(x: torch.Tensor, format: NumberFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of x transposed: [rows, width] → (codes [width, rows], fp32 [width, 1])."""
    if x.is_cuda:
        from ftray.model.fp8_kernels import quantize_columns as kernel

        return kernel(x, format.dtype, format.largest)
    return quantize_rows(x.T, format)


_last: tuple[Any, Any, tuple[torch.Tensor, torch.Tensor]] | None = None


def _shared_rows(x: torch.Tensor, format: NumberFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of an activation, cached until the next call: parallel layers read the same activation."""
    global _last
    whole, version = version_of(x)
    key = (version, x.data_ptr(), x.shape, x.stride(), format)
    if _last is None or _last[0]() is not whole or _last[1] != key:
        _last = (weakref.ref(whole), key, quantize_rows(x, format))
    return _last[2]


def _scaled_product(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x [tokens, k] times weight [n, k], both in 8 bits, transposed; scales [tokens, 1] and [1, n]."""
    if not x.is_cuda:
        return ((x.float() * x_scale) @ (weight.float() * scale.T).T).to(dtype)
    if x.dtype == torch.int8:
        from ftray.model.fp8_kernels import scale_sums

        padding = max(0, MIN_ROWS - len(x))
        sums = int8_product(torch.nn.functional.pad(x, (0, 0, 0, padding)) if padding else x, weight.T)
        return scale_sums(sums[: len(x)], x_scale, scale, dtype)
    return fp8_product(x, weight.T, x_scale, scale, dtype)


def check_device(format: NumberFormat, device: torch.device) -> None:
    """Raises ConfigError if the device does not support the format."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < format.capability:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        major, minor = format.capability
        raise ConfigError(
            f"method.base_precision {format.name} needs a GPU of compute capability {major}.{minor} ({format.card}) or newer, "
            f"this worker has {name}; remove it"
        )


def use_eight_bits(model: torch.nn.Module, method: config.MethodConfig, device: torch.device) -> int:
    """Replaces linear layers as `method.base_precision` says, and moves frozen ones to the device; returns their number.

    Applies to the bases of adapters or, in full fine-tuning, to the layers of the blocks. Exempt are layers whose dimensions
    are not multiples of 16, attention, routers and the whole last block: rounding these costs far more loss than their share of
    the arithmetic (docs/benchmarks.md).
    """
    kind, is_full = FORMATS[method.base_precision or ""], method.type == "full"
    layers = list(_layers(model, "" if is_full else ".base_layer"))
    for name, layer in layers:
        model.set_submodule(name, TrainedLinear(layer) if is_full else FrozenLinear(layer.to(device), kind))
    return len(layers)


def _layers(model: torch.nn.Module, suffix: str) -> Iterator[tuple[str, torch.nn.Linear]]:
    blocks, family = list(layers_of(model)), family_of(model.config)
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear or not name.endswith(suffix):
            continue
        base = name.removesuffix(suffix)
        is_inside = any(base.startswith(f"{block}.") for block in blocks[:-1])
        if (
            is_inside
            and family.computes_in_8_bits(base)
            and module.in_features % SIDES == 0
            and module.out_features % SIDES == 0
        ):
            yield name, module
