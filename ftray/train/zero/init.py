"""Shards a model for ZeRO-3 one parameter at a time, so that no device ever holds the whole model.

Rank 0 has the model in host memory, mapped from its files where their precision is the run's; the other ranks have its outline
on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ftray.compat.deepspeed import shard_parameter
from ftray.errors import RunError
from ftray.model.families.base import layers_of
from ftray.train.parallel import DeviceMesh


@dataclass(frozen=True)
class _Outline:
    """A parameter of rank 0. names: All its names; tied weights have several."""

    names: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool


def partition_model(model: torch.nn.Module, settings: dict[str, Any], mesh: DeviceMesh) -> None:
    """Shards all parameters and copies all buffers to every rank. Collective.

    Each rank holds its parts and at most one whole parameter.

    Args:
        model: With its values on rank 0; other ranks may have it on the meta device.
        settings: DeepSpeed's config of stage 3; it says where parts are offloaded.
        mesh: This rank's place.

    Raises:
        RunError: The models of the ranks differ.
    """
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False)
    # A module without parameters: they are handed over one by one below.
    init = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=settings)
    device = mesh.device
    for outline in _outlines(model, mesh):
        if not mesh.is_first:
            empty = torch.empty(outline.shape, dtype=outline.dtype, device=device)
            parameter = torch.nn.Parameter(empty, requires_grad=outline.trained)
            for name in outline.names:
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, parameter)
        shard_parameter(init, model.get_parameter(outline.names[0]))
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, key, _same_everywhere(buffer, device))


def _outlines(model: torch.nn.Module, mesh: DeviceMesh) -> list[_Outline]:
    """The parameters of rank 0, on every rank."""
    outlines: dict[int, _Outline] = {}
    names = []
    for name, p in model.named_parameters(remove_duplicate=False):
        names.append(name)
        outlines.setdefault(id(p), _Outline([], tuple(p.shape), p.dtype, p.requires_grad)).names.append(name)
    result, expected = mesh.broadcast((list(outlines.values()), names))
    if names != expected:
        odd = sorted(set(names) ^ set(expected)) or names
        raise RunError(
            f"the model's outline differs from its weights at {odd[0]}; this is a bug in ftray, please report it"
        )
    return list(result)


def _same_everywhere(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rank 0's values of a buffer, on the device."""
    if buffer.is_meta:
        buffer = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    buffer = buffer.to(device).contiguous()
    if buffer.numel():
        dist.broadcast(buffer.reshape(-1).view(torch.uint8), src=0)
    return buffer


def gather_by_layers(decoder: torch.nn.Module) -> None:
    """Makes DeepSpeed gather a block's weights at once: the number of calls costs more than the bytes.

    Blocks without a trained parameter in front of them are left out: DeepSpeed 0.19 ends a block's backward pass when the
    gradient of its input arrives, and takes a block without such a gradient as ended when it begins. Call it before the
    engine is built.
    """
    from deepspeed.utils import set_z3_leaf_module

    layers, is_reached = layers_of(decoder), False
    for name, module in decoder.named_modules():
        if name in layers and is_reached:
            set_z3_leaf_module(module, True)
        is_reached |= any(p.requires_grad for p in module.parameters(recurse=False))


@contextmanager
def gathered_in_use(model: torch.nn.Module, units: list[torch.nn.Module]) -> Iterator[None]:
    """Inside, sharded modules gather their weights while they compute: for trial passes without an engine.

    Args:
        model: The sharded model.
        units: Modules, none inside another, whose weights are gathered at once; others gather one module at a time.
    """
    import deepspeed

    inside = {id(module) for unit in units for module in unit.modules()}
    alone = [m for m in model.modules() if id(m) not in inside and any(True for _ in m.parameters(recurse=False))]
    hooks = []
    for unit, recurse in [*((u, True) for u in units), *((m, False) for m in alone)]:
        gathered = deepspeed.zero.GatheredParameters(list(unit.parameters(recurse)))
        hooks.append(unit.register_forward_pre_hook(lambda *_, g=gathered: g.__enter__()))
        hooks.append(unit.register_forward_hook(lambda *_, g=gathered: g.__exit__(None, None, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
