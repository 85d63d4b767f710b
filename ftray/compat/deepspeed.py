"""Private and patched APIs of DeepSpeed. Seen with deepspeed 0.19.8; contract tests: tests/unit/test_compat.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def without_compiler() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collectives on CPU.

    Reason: TorchBackend builds the op `deepspeed_shm_comm` with a C++ compiler as soon as a CPU process group is set up, and
    fails where there is none. It is a speed-up of collectives inside one host only. Upstream: deepspeed/comm/torch.py,
    build_shm_op.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def count_overflows(engine: Any) -> None:
    """Makes an engine skip steps with non-finite gradients in fp32, too.

    Reason: DeepSpeed checks gradients only in 16 bits. The attribute `check_grad_overflow` of its ZeRO optimizers is not
    documented.
    """
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True


def shard_parameter(init: Any, parameter: torch.nn.Parameter) -> None:
    """Shards one parameter, as `deepspeed.zero.Init(module=model)` does for all: broadcast from rank 0, then partition.

    Reason: `Init` needs the whole model on every rank; ftray hands the parameters over one by one, so that no rank holds
    more than one. Upstream: deepspeed/runtime/zero/partition_parameters.py, Init._convert_to_zero_parameters.
    """
    init._convert_to_zero_parameters([parameter])


def shard_rank(optimizer: Any, parameter: torch.nn.Parameter) -> int:
    """The place of this rank's part among the parts of a ZeRO-3 parameter.

    Reason: there is no public way to learn which elements a rank holds. Upstream: stage3.py, _get_param_partition_rank.
    """
    return int(optimizer._get_param_partition_rank(parameter))


def shard_state(optimizer: Any, parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor:
    """A view of this rank's part of a ZeRO-3 parameter's fp32 weights (None) or of a moment, flat.

    Reason: `deepspeed.utils.safe_get_local_fp32_param` and its siblings return copies and cannot write with offloading.
    Upstream: stage3.py, _get_fp32_opt_state_partition.
    """
    part: torch.Tensor = optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=key
    )[0]
    return part


def fragment(parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor:
    """A view of this rank's part of a parameter's fp32 weights (None) or of a moment under ZeRO-1 and 2, flat.

    Reason: `deepspeed.utils.safe_get_full_fp32_param` gathers the whole. Upstream: utils/tensor_fragment.py, _hp_mapping.
    """
    view: torch.Tensor = parameter._hp_mapping.get_hp_fragment(key)
    return view


def fragment_span(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """Elements [start, end) of a flattened parameter whose fp32 weights this rank holds under ZeRO-1 and 2.

    Reason and upstream: as `fragment`.
    """
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    address = mapping.lp_fragment_address if mapping is not None else None
    return (address.start, address.start + address.numel) if address is not None else (0, 0)


def link_moments(optimizer: Any) -> None:
    """Lets each parameter find its part of moments that were put into a ZeRO-1 or 2 optimizer from outside.

    Reason: DeepSpeed links them only after the first step. Upstream: stage_1_and_2.py,
    _lazy_init_hp_params_optimizer_state.
    """
    optimizer._lazy_init_hp_params_optimizer_state()
