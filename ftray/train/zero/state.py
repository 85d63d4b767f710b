"""Training state by parameter name: reads and restores the fp32 master weights and Adam's moments of a DeepSpeed engine.

Each rank gives the parts that it holds and takes the parts that it needs, without communication. Names and offsets are those of
whole tensors, so that world size and ZeRO stage may change in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftray.compat.deepspeed import fragment, fragment_span, link_moments, shard_rank, shard_state
from ftray.train.checkpoint.tensors import SplitFp32, TensorPart
from ftray.train.optim.adamw import GROUP, AdamW
from ftray.train.parallel import DeviceMesh

KINDS = ("weights", "exp_avg", "exp_avg_sq")
Ranges = list[tuple[str, int, int]]  # (name, start, end) of flattened tensors


def local_parts(engine: Any, parameters: dict[str, torch.nn.Parameter], mesh: DeviceMesh) -> list[TensorPart]:
    """This rank's share of `<kind>.<name>`, as views of the engine's memory; the shares of all ranks are the whole.

    Before the first optimizer step there are no moments. 8-bit moments stay as they are, each with its scales.
    """
    if isinstance(engine.optimizer, AdamW):
        return _own_parts(engine.optimizer, parameters, _shares(parameters, mesh))
    parts = []
    kinds = KINDS if _has_moments(engine) else KINDS[:1]
    spans = _spans(engine, parameters, mesh)
    for name, parameter in parameters.items():
        start, end = spans[name]
        if start < end:
            shape = tuple(_shape(parameter))
            for kind in kinds:
                values = _local(engine, parameter, kind)[: end - start]
                parts.append(TensorPart(f"{kind}.{name}", shape, start, values.detach()))
    return parts


def local_bytes(engine: Any, parameters: dict[str, torch.nn.Parameter], mesh: DeviceMesh) -> int:
    """Bytes of this rank's share once there are moments."""
    spans = _spans(engine, parameters, mesh).values()
    if isinstance(engine.optimizer, AdamW) and engine.optimizer.eight_bit:
        return sum(6 * (end - start) + 2 * 4 * ((end - start) // GROUP + 1) for start, end in spans)
    return len(KINDS) * 4 * sum(end - start for start, end in spans)


def restore_parts(
    engine: Any,
    parameters: dict[str, torch.nn.Parameter],
    read_many: Callable[[Ranges], Iterator[torch.Tensor]],
    num_updates: int,
    mesh: DeviceMesh,
) -> None:
    """Restores the state of an engine, new or in use.

    Args:
        engine: DeepSpeed's engine.
        parameters: Trainable parameters by name.
        read_many: Reads elements of flattened tensors by name.
        num_updates: Adam's step count.
        mesh: This rank's place.

    Raises:
        CheckpointError: The checkpoint lacks a tensor.
    """
    if isinstance(engine.optimizer, AdamW):
        _restore_own(engine.optimizer, parameters, read_many, num_updates)
        return
    if num_updates or _has_moments(engine):
        _clear_moments(engine, num_updates)
    stage, spans = _stage(engine), _spans(engine, parameters, mesh)
    ranges: Ranges = []
    for name, parameter in parameters.items():
        for kind in KINDS if num_updates else KINDS[:1]:
            is_whole = kind == "weights" and stage < 3  # with whole weights every rank computes
            ranges.append((f"{kind}.{name}", *((0, math.prod(_shape(parameter))) if is_whole else spans[name])))
    values = read_many(ranges)
    for name, parameter in parameters.items():
        for kind in KINDS if num_updates else KINDS[:1]:
            _put(engine, parameter, kind, next(values), spans[name])
    if stage == 3 and (kept := engine.optimizer.persistent_parameters):
        kept[0].partition(kept)  # small ones that stay whole between steps: they are gathered again when next used


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def _flat_masters(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors that the inner Adam updates: flat partitions."""
    if _stage(engine) == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [p for group in inner.param_groups for p in group["params"]]


def _clear_moments(engine: Any, num_updates: int) -> None:
    """Zeroes the moments and sets Adam's step count. Existing tensors are overwritten: parameters refer to them."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    is_fused = bool(inner.param_groups[0].get("fused"))  # torch's fused Adam keeps its count on the device
    for flat in _flat_masters(engine):
        if state := inner.state.get(flat):
            state["step"].fill_(num_updates)
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
            continue
        inner.state[flat] = {
            "step": torch.tensor(float(num_updates), device=flat.device if is_fused else "cpu"),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if _stage(engine) in (1, 2):
        link_moments(engine.optimizer)


def _has_moments(engine: Any) -> bool:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return any(inner.state.get(flat) for flat in _flat_masters(engine))


def _spans(engine: Any, parameters: dict[str, torch.nn.Parameter], mesh: DeviceMesh) -> dict[str, tuple[int, int]]:
    """Elements [start, end) of each flattened parameter that this rank holds; an equal share of replicated ones."""
    if _stage(engine) == 0:
        return _shares(parameters, mesh)
    spans = {}
    for name, parameter in parameters.items():
        size = math.prod(_shape(parameter))
        if _stage(engine) == 3:
            part = _local(engine, parameter, "weights").numel()
            start = min(shard_rank(engine.optimizer, parameter) * part, size)
            end = min(start + part, size)  # the last part is padded
        else:
            start, end = fragment_span(parameter)
        spans[name] = (start, end)
    return spans


def _shares(parameters: dict[str, torch.nn.Parameter], mesh: DeviceMesh) -> dict[str, tuple[int, int]]:
    """Elements [start, end) of each flattened parameter in this rank's equal share of all elements."""
    spans, at = {}, 0
    total = sum(math.prod(_shape(p)) for p in parameters.values())
    mine = total * mesh.data_rank // mesh.data_size, total * (mesh.data_rank + 1) // mesh.data_size
    for name, parameter in parameters.items():
        size = math.prod(_shape(parameter))
        start, end = (min(max(edge - at, 0), size) for edge in mine)
        spans[name] = (start, end)
        at += size
    return spans


def _own_parts(
    optimizer: AdamW, parameters: dict[str, torch.nn.Parameter], spans: dict[str, tuple[int, int]]
) -> list[TensorPart]:
    """`local_parts` for ftray's own optimizer, whose whole state every rank has."""
    parts = []
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        start, end = spans[name]
        if start == end:
            continue
        flat = parameter.detach().flatten()[start:end]
        rest = state["rest"].flatten()[start:end] if "rest" in state else None
        weights = SplitFp32(flat, rest) if rest is not None else flat.float()
        parts.append(TensorPart(f"weights.{name}", tuple(parameter.shape), start, weights))
        for kind, tensor in state.items():
            if kind == "rest":
                continue
            # A scale belongs to GROUP elements; the rank with the first of them saves it.
            lo, hi = (-(-start // GROUP), -(-end // GROUP)) if kind.endswith("_scale") else (start, end)
            if lo < hi:
                parts.append(TensorPart(f"{kind}.{name}", tuple(tensor.shape), lo, tensor.flatten()[lo:hi]))
    return parts


def _restore_own(
    optimizer: AdamW,
    parameters: dict[str, torch.nn.Parameter],
    read_many: Callable[[Ranges], Iterator[torch.Tensor]],
    num_updates: int,
) -> None:
    optimizer.num_updates = num_updates
    shapes = {
        (name, kind): shape
        for name, parameter in parameters.items()
        for kind, shape in optimizer.shapes(parameter).items()
        if num_updates or kind == "weights"
    }
    values = read_many([(f"{kind}.{name}", 0, math.prod(shape)) for (name, kind), shape in shapes.items()])
    for name, parameter in parameters.items():
        mine = {kind: shape for (of, kind), shape in shapes.items() if of == name}
        optimizer.import_state(parameter, {kind: next(values).view(shape) for kind, shape in mine.items()})


def _local(engine: Any, parameter: Any, kind: str) -> torch.Tensor:
    """This rank's part of a sharded parameter, flat."""
    key = None if kind == "weights" else kind
    return shard_state(engine.optimizer, parameter, key) if _stage(engine) == 3 else fragment(parameter, key)


def _put(engine: Any, parameter: Any, kind: str, values: torch.Tensor, span: tuple[int, int]) -> None:
    """values: This rank's span, or all elements of weights below stage 3."""
    stage = _stage(engine)
    mine = values[span[0] : span[1]] if stage < 3 and kind == "weights" else values
    if span[0] < span[1]:
        _local(engine, parameter, kind)[: mine.numel()].data.copy_(mine)
    # The copy that computes; ZeRO would update it only with the next step.
    if kind == "weights" and stage == 3:
        parameter.ds_tensor.data[: values.numel()].copy_(values)
    elif kind == "weights":
        parameter.data.copy_(values.view(_shape(parameter)))
