"""AdamW for ZeRO stage 0: exact fp32 master weights with little memory, 32-bit or 8-bit moments, gradient clipping.

For a bf16 weight, only the 16 bits of its fp32 master that bf16 lacks are stored; both together are the master, bit for bit.
A step with non-finite gradients changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ftray.compat.torch import norms
from ftray.train.memory import EIGHT_BIT, PAGED

GROUP = 64  # consecutive elements that share a scale in 8-bit moments
FULL = "adamw"
SMALL = 2**22  # elements; smaller parameters are updated in one kernel launch, which costs more than the update


class AdamW(torch.optim.Optimizer):
    """AdamW on bf16 or fp32 parameters; gradients must be equal on all ranks.

    After a step, `overflow` says whether it was skipped, and `_global_grad_norm` is the norm before clipping: both names are
    those that DeepSpeed's engine reads.

    Args:
        params: bf16 or fp32 parameters.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are clipped to this norm; 0: no clipping.
        moments: `adamw` keeps moments in fp32, `adamw-8bit` in one byte each (see `encode_mean`, `encode_square`);
            `…-paged` keeps them in host memory between updates.
        betas: Decay rates of the moments.
        eps: Added to the denominator.

    Source:
        Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization.
    """

    KINDS = ("weights", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
        moments: str = FULL,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.eight_bit, self.max_grad_norm = moments.removesuffix(PAGED) == EIGHT_BIT, max_grad_norm
        self.paged = moments.endswith(PAGED)
        self.num_updates, self.overflow = 0, False
        self._global_grad_norm = 0.0
        for p in self._parameters():
            if p.dtype not in (torch.bfloat16, torch.float32):
                raise TypeError(f"parameters are bf16 or fp32, not {p.dtype}")

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update from the parameters' `.grad`; none if the norm of all gradients is not finite."""
        del closure
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(norms(grads))))
        self._global_grad_norm, self.overflow = norm, not math.isfinite(norm)
        if self.overflow:
            return
        self.num_updates += 1
        clip = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm > 0 else 1.0
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            small = [p for p in trained if self._is_small(p)]
            if small:
                from ftray.train.optim.adamw_kernels import update_many

                states = [(p, p.grad, self.state[p] or self._fresh(p)) for p in small]
                update_many(states, group, clip, self.num_updates)
            for p in trained:
                if not self._is_small(p):
                    self._update(p, p.grad.contiguous(), group, clip)
        if self.paged and grads and grads[0].is_cuda:
            torch.cuda.current_stream(
                grads[0].device
            ).synchronize()  # moments are copied back: a checkpoint may read them

    def _is_small(self, p: torch.nn.Parameter) -> bool:
        return p.is_cuda and p.numel() <= SMALL and not (self.eight_bit or self.paged)

    def _update(self, p: torch.nn.Parameter, grad: torch.Tensor, group: dict[str, Any], clip: float) -> None:
        state = self.state[p] or self._fresh(p)
        if p.is_cuda:
            from ftray.train.optim.adamw_kernels import update

            # All on one stream, so that each copy waits for the previous operation.
            on_gpu = {kind: t.to(p.device, non_blocking=True) for kind, t in state.items()}
            update(p, grad, on_gpu, group, clip, self.num_updates, GROUP if self.eight_bit else None)
            for kind, t in state.items():
                if on_gpu[kind] is not t:
                    t.copy_(on_gpu[kind], non_blocking=True)
            return
        (beta1, beta2), t = group["betas"], self.num_updates
        master, grad = whole(p, state), grad.float() * clip
        mean, square = self._moments(state)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        master.mul_(1 - group["lr"] * group["weight_decay"])
        master.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**t))
        _put(p, state, master)
        if self.eight_bit:
            state["exp_avg"], state["exp_avg_scale"] = encode_mean(mean)
            state["exp_avg_sq"], state["exp_avg_sq_scale"] = encode_square(square, t)

    def _fresh(self, p: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """The state before the first update: the master weight is the weight, moments are zero."""
        state: dict[str, torch.Tensor] = {}
        if p.dtype == torch.bfloat16:
            state["rest"] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.contiguous_format)
        options: dict[str, Any] = {"device": p.device}
        if self.paged:
            options = {"device": "cpu", "pin_memory": p.is_cuda}
        for kind in ("exp_avg", "exp_avg_sq"):
            if self.eight_bit:
                dtype = torch.int8 if kind == "exp_avg" else torch.uint8
                state[kind] = torch.zeros(p.shape, dtype=dtype, **options)
                state[f"{kind}_scale"] = torch.zeros(-(-p.numel() // GROUP), **options)
            else:
                state[kind] = torch.zeros(p.shape, dtype=torch.float32, **options)
        self.state[p] = state
        return state

    def _moments(self, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.eight_bit:
            return state["exp_avg"], state["exp_avg_sq"]
        mean = decode_mean(state["exp_avg"], state["exp_avg_scale"])
        return mean, decode_square(state["exp_avg_sq"], state["exp_avg_sq_scale"])

    def shapes(self, p: torch.nn.Parameter) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a parameter in a checkpoint: `weights` (fp32 master), and its moments as they are stored."""
        kinds = self.KINDS if self.eight_bit else self.KINDS[:3]
        groups = (-(-p.numel() // GROUP),)
        return {kind: groups if kind.endswith("_scale") else tuple(p.shape) for kind in kinds}

    def import_state(self, p: torch.nn.Parameter, saved: dict[str, torch.Tensor]) -> None:
        """Restores the tensors of a checkpoint, bit for bit; missing moments are zero."""
        state = self._fresh(p)
        _put(p, state, saved["weights"].to(p.device))
        for kind in saved.keys() & state.keys():
            state[kind].copy_(saved[kind])


def whole(p: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fp32 master of a parameter: a new tensor for bf16, the parameter itself for fp32."""
    if p.dtype == torch.float32:
        return p.detach()
    if "rest" not in state:
        return p.detach().float()
    high = p.detach().contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + state["rest"]).view(torch.float32)


def _put(p: torch.Tensor, state: dict[str, torch.Tensor], master: torch.Tensor) -> None:
    """Splits a master weight into the nearest bf16 weight and the remaining bits."""
    if p.dtype == torch.float32:
        if master.data_ptr() != p.data_ptr():
            p.data.copy_(master)
        return
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    state["rest"].copy_(bits - (high << 16))
    p.data.copy_(high.to(torch.int16).view(torch.bfloat16))


def encode_mean(mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 → int8 codes of the same shape and a scale per GROUP, with finer steps near zero: 2x / (1 + |x|)."""
    groups = _grouped(mean)
    scale = groups.abs().amax(1)
    x = groups / scale.clamp_min(1e-30)[:, None]
    codes = torch.round(127 * 2 * x / (1 + x.abs())).to(torch.int8)
    return codes.flatten()[: mean.numel()].view(mean.shape), scale


def decode_mean(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_mean`, to fp32."""
    y = _grouped(codes.float()) / 127
    return (y / (2 - y.abs()) * scale[:, None]).flatten()[: codes.numel()].view(codes.shape)


def encode_square(square: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ≥ 0 → uint8 codes of the fourth root, and a scale per GROUP.

    Stochastic rounding keeps a slow decay from being rounded away; the random numbers are a function of (step, element).
    Nonzero values stay nonzero: dividing a mean by zero would be a huge update.
    """
    groups = _grouped(square).sqrt().sqrt_()
    scale = groups.amax(1)
    y = 255 * groups / scale.clamp_min(1e-30)[:, None]
    codes = (y + _chance(groups.numel(), step).view_as(y)).floor().clamp_max(255)
    codes = torch.where(y > 0, codes.clamp_min(1), codes).to(torch.uint8)
    return codes.flatten()[: square.numel()].view(square.shape), scale


def decode_square(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_square`, to fp32."""
    root = _grouped(codes.float()) * (scale / 255)[:, None]
    return (root * root).square_().flatten()[: codes.numel()].view(codes.shape)


def _grouped(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)


def _chance(number: int, step: int) -> torch.Tensor:
    """Pseudorandom numbers in [0, 1), a hash of (element, step): the same on every device."""
    mask = 0xFFFFFFFF
    h = (torch.arange(number) * 0x9E3779B1 + step * 0x85EBCA77) & mask
    h ^= h >> 16
    h = (h * 0x7FEB352D) & mask
    h ^= h >> 15
    h = (h * 0x846CA68B) & mask
    h ^= h >> 16
    return (h >> 8).float() / 2**24
