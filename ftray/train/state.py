"""Training state by parameter name: fp32 masters and Adam's moments, out of and into a DeepSpeed engine.

Each rank gives the parts that it holds, without a word to the others, and takes back the parts it needs; names and
places are those of whole tensors, so that world size and ZeRO stage may be others when they return. Knows DeepSpeed's
engines; nothing of files or steps on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftray.train.shards import Part

KINDS = ("weights", "exp_avg", "exp_avg_sq")
Wanted = list[tuple[str, int, int]]  # (name, start, end) of flattened tensors


def local_parts(engine: Any, parameters: dict[str, torch.nn.Parameter], rank: int, world_size: int) -> list[Part]:
    """This rank's share of `<kind>.<name>`, as views of the engine's own memory; all ranks' shares are the whole.

    Moments are left out before the first optimizer step.
    """
    parts = []
    kinds = KINDS if _has_moments(engine) else KINDS[:1]
    spans = _spans(engine, parameters, rank, world_size)
    for name, parameter in parameters.items():
        start, end = spans[name]
        if start < end:
            shape = tuple(_shape(parameter))
            for kind in kinds:
                if _stage(engine) == 0:
                    values = _replicated(engine, parameter, kind).flatten()[start:end]
                else:
                    values = _local(engine, parameter, kind)[: end - start]
                parts.append(Part(f"{kind}.{name}", shape, start, values.detach()))
    return parts


def local_bytes(engine: Any, parameters: dict[str, torch.nn.Parameter], rank: int, world_size: int) -> int:
    """Bytes of this rank's share once there are moments."""
    spans = _spans(engine, parameters, rank, world_size).values()
    return len(KINDS) * 4 * sum(end - start for start, end in spans)


def restore_parts(
    engine: Any,
    parameters: dict[str, torch.nn.Parameter],
    read_many: Callable[[Wanted], Iterator[torch.Tensor]],
    num_updates: int,
    rank: int,
    world_size: int,
) -> None:
    """Puts state back into a fresh engine. read_many: elements by name; num_updates is Adam's step count.

    Raises CheckpointError where the checkpoint doesn't hold what the engine needs.
    """
    if num_updates:
        _create_moments(engine, num_updates)
    stage, spans = _stage(engine), _spans(engine, parameters, rank, world_size)
    wanted: Wanted = []
    for name, parameter in parameters.items():
        for kind in KINDS if num_updates else KINDS[:1]:
            # Below stage 3 every rank computes with whole weights; at stage 0 it holds all of the rest too.
            is_whole = stage == 0 or (kind == "weights" and stage < 3)
            wanted.append((f"{kind}.{name}", *((0, math.prod(_shape(parameter))) if is_whole else spans[name])))
    values = read_many(wanted)
    for name, parameter in parameters.items():
        for kind in KINDS if num_updates else KINDS[:1]:
            _put(engine, parameter, kind, next(values), spans[name])


def forget_dry_run(engine: Any) -> None:
    """Undoes an empty step that DeepSpeed makes in advance at stage 0 in half precision: Adam would count it.

    It left the weights alone only if the learning rate was 0.
    """
    if _stage(engine) == 0 and (inner := getattr(engine.optimizer, "optimizer", None)) is not None:
        inner.state.clear()


def guard_step(engine: Any) -> None:
    """Keeps what is not finite from the weights at stage 0 in fp32, where DeepSpeed doesn't look: no step, `overflow` set.

    Gradients are summed over the ranks by then, so all ranks decide alike.
    """
    optimizer = engine.optimizer
    if _stage(engine) != 0 or hasattr(optimizer, "overflow"):
        return
    step = optimizer.step

    def guarded(*args: Any, **kwargs: Any) -> Any:
        found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack([gradient.norm() for gradient in found]) if found else torch.zeros(1)
        optimizer.overflow = not bool(torch.isfinite(norms).all())
        return None if optimizer.overflow else step(*args, **kwargs)

    optimizer.overflow, optimizer.step = False, guarded


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
    is_fused = bool(inner.param_groups[0].get("fused"))  # torch's fused Adam counts where the weights are
    for flat in _flat_masters(engine):
        inner.state[flat] = {
            "step": torch.tensor(float(num_updates), device=flat.device if is_fused else "cpu"),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if _stage(engine) in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # lets each parameter find its part of the moments


def _has_moments(engine: Any) -> bool:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return any(inner.state.get(flat) for flat in _flat_masters(engine))


def _spans(
    engine: Any, parameters: dict[str, torch.nn.Parameter], rank: int, world_size: int
) -> dict[str, tuple[int, int]]:
    """Elements [start, end) of each flattened parameter that this rank holds; of replicated ones, an equal share."""
    spans, at = {}, 0
    total = sum(math.prod(_shape(p)) for p in parameters.values())
    mine = total * rank // world_size, total * (rank + 1) // world_size
    for name, parameter in parameters.items():
        size = math.prod(_shape(parameter))
        if _stage(engine) == 0:
            start, end = (min(max(edge - at, 0), size) for edge in mine)
        elif _stage(engine) == 3:
            part = _local(engine, parameter, "weights").numel()
            start = min(engine.optimizer._get_param_partition_rank(parameter) * part, size)
            end = min(start + part, size)  # the last part is padded
        else:
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            address = mapping.lp_fragment_address if mapping is not None else None
            start, end = (address.start, address.start + address.numel) if address is not None else (0, 0)
        spans[name] = (start, end)
        at += size
    return spans


def _local(engine: Any, parameter: Any, kind: str) -> torch.Tensor:
    """What this rank holds of a sharded parameter, flat."""
    key = None if kind == "weights" else kind
    if _stage(engine) == 3:
        get = engine.optimizer._get_fp32_opt_state_partition
        part: torch.Tensor = get(parameter, release_swap_buffers=False, optim_state_key=key)[0]
    else:
        part = parameter._hp_mapping.get_hp_fragment(key)
    return part


def _replicated(engine: Any, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    """Stage 0: a whole tensor."""
    master = _whole_master(engine, parameter)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    whole: torch.Tensor = master if kind == "weights" else inner.state[master][kind]
    return whole


def _put(engine: Any, parameter: Any, kind: str, values: torch.Tensor, span: tuple[int, int]) -> None:
    """values: this rank's span, or all elements where `restore_parts` asks for them."""
    stage = _stage(engine)
    if stage == 0:
        _replicated(engine, parameter, kind).data.copy_(values.view(_shape(parameter)))
    else:
        mine = values[span[0] : span[1]] if stage < 3 and kind == "weights" else values
        if span[0] < span[1]:
            _local(engine, parameter, kind)[: mine.numel()].data.copy_(mine)
    # The copy that computes; ZeRO would renew it only with the next step.
    if kind == "weights" and stage == 3:
        parameter.ds_tensor.data[: values.numel()].copy_(values)
    elif kind == "weights":
        parameter.data.copy_(values.view(_shape(parameter)))


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
