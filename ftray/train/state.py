"""Training state by parameter name: fp32 masters and Adam's moments, out of and into a DeepSpeed engine.

Independent of world size and ZeRO stage: every tensor is whole. Knows DeepSpeed's engines; nothing of files or steps
on disk. Both directions are collective: all ranks call them, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch

from ftray.train.adamw import AdamW

KINDS = ("weights", "exp_avg", "exp_avg_sq")


def gather_state(engine: Any, parameters: dict[str, torch.nn.Parameter], keep: bool) -> dict[str, torch.Tensor]:
    """`<kind>.<name>` → whole fp32 tensor in host memory; an empty dict where `keep` is False (all but one rank).

    Moments are left out before the first optimizer step. Those of 8 bits stay as they are, each with its scales.
    """
    state: dict[str, torch.Tensor] = {}
    if isinstance(engine.optimizer, AdamW):
        for name, parameter in parameters.items() if keep else ():
            for kind, tensor in engine.optimizer.export_state(parameter).items():
                state[f"{kind}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
        return state
    for name, parameter in parameters.items():
        for kind in KINDS:
            whole = _gather(engine, parameter, None if kind == "weights" else kind)
            if keep and whole is not None:
                state[f"{kind}.{name}"] = (
                    whole.detach().to("cpu", torch.float32, copy=True).reshape(_shape(parameter)).contiguous()
                )
    return state


def scatter_state(
    engine: Any, parameters: dict[str, torch.nn.Parameter], state: dict[str, torch.Tensor], num_updates: int
) -> None:
    """Puts gathered tensors back into a fresh engine; num_updates is Adam's step count."""
    if isinstance(engine.optimizer, AdamW):
        engine.optimizer.num_updates = num_updates
        for name, parameter in parameters.items():
            saved = {kind: state[key] for kind in AdamW.KINDS if (key := f"{kind}.{name}") in state}
            engine.optimizer.import_state(parameter, saved)
        return
    if num_updates:
        _create_moments(engine, num_updates)
    for name, parameter in parameters.items():
        for kind in KINDS:
            if f"{kind}.{name}" in state:
                _scatter(engine, parameter, state[f"{kind}.{name}"], None if kind == "weights" else kind)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def _flat_masters(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors that the inner Adam updates: flat partitions under ZeRO, whole tensors without."""
    if _stage(engine) == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [p for group in inner.param_groups for p in group["params"]]


def _create_moments(engine: Any, num_updates: int) -> None:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for flat in _flat_masters(engine):
        inner.state[flat] = {
            "step": torch.tensor(float(num_updates)),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if _stage(engine) in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # lets each parameter find its part of the moments


def _gather(engine: Any, parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor | None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if key is not None and not any(inner.state.get(flat) for flat in _flat_masters(engine)):
        return None
    if _stage(engine) == 0:
        master = _whole_master(engine, parameter)
        whole: torch.Tensor = master if key is None else inner.state[master][key]
        return whole
    found: torch.Tensor = (
        safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    )
    return found


def _scatter(engine: Any, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.to(_flat_masters(engine)[0].device)
    stage = _stage(engine)
    if stage == 3:
        _scatter_partition(engine, parameter, value, key)
    elif stage == 0:
        master = _whole_master(engine, parameter)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        (master if key is None else inner.state[master][key]).data.copy_(value)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
    if key is None and stage != 3:
        parameter.data.copy_(value)  # the copy that computes; ZeRO would renew it only with the next step


def _whole_master(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Stage 0: the fp32 master of a parameter, which is the parameter itself in fp32."""
    low, high = getattr(engine.optimizer, "fp16_groups", None), getattr(engine.optimizer, "fp32_groups", None)
    if low is None or high is None:
        return parameter
    for low_group, high_group in zip(low, high, strict=True):
        for p, master in zip(low_group, high_group, strict=True):
            if p is parameter:
                found: torch.Tensor = master
                return found
    raise KeyError("parameter is not in the optimizer")


def _scatter_partition(engine: Any, parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Stage 3: this rank's part of a whole tensor. The last part is shorter than the others where it doesn't divide."""
    optimizer = engine.optimizer
    part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    rank = optimizer._get_param_partition_rank(parameter)
    mine = value.flatten()[part.numel() * rank : part.numel() * (rank + 1)]
    part.data.zero_()
    part.data[: mine.numel()].copy_(mine)
    if key is None:
        computing = parameter.ds_tensor.data
        computing.zero_()
        computing[: mine.numel()].copy_(mine)
