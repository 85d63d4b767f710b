"""DeepSpeed's config from a run's settings. Imports neither DeepSpeed nor torch."""

from __future__ import annotations

from typing import Any

from ftray import config
from ftray.errors import ConfigError

OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload",
    "zero_optimization.offload_param": "deepspeed.offload",
}


SIZES = {  # of zero_optimization, in elements: defaults of DeepSpeed 0.19
    "reduce_bucket_size": 5e8,
    "stage3_max_live_parameters": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
}


def deepspeed_config(
    train: config.TrainConfig, deepspeed: config.DeepSpeedConfig, micro_batch_size: int, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's config for a run.

    At stage 0 ftray's own optimizer (`adamw.py`) keeps master weights and clips gradients, so DeepSpeed does neither.

    Raises:
        ConfigError: An override sets what a key of the run file decides, or is invalid.
    """
    ours = owns_optimizer(train, deepspeed)
    for key, decider in OWNED.items():
        if _has_key(deepspeed.overrides, key):
            raise ConfigError(f"deepspeed.overrides.{key} is set by {decider}; change that instead")
    for key in SIZES:
        size_of(deepspeed, key)
    derived: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (micro_batch_size * world_size),
        "gradient_clipping": 0.0 if ours else train.max_grad_norm,
        "bf16": {"enabled": train.precision == "bf16" and not ours, "check_grad_overflow": True},
        "zero_optimization": {"stage": deepspeed.zero_stage, **_offload(deepspeed.offload)},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if ours and train.precision == "bf16":
        derived["communication_data_type"] = "bf16"
    if train.precision == "fp16":
        # Dynamic scale from 2^16; halved by each step that overflows, doubled after 1,000 steps without overflow.
        derived["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}
    if deepspeed.offload != "none":
        derived["zero_force_ds_cpu_optimizer"] = False  # torch's Adam: DeepSpeed's needs a compiler
    return _merge(derived, deepspeed.overrides)


def _offload(target: str) -> dict[str, Any]:
    keys = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    return {key: {"device": "cpu", "pin_memory": True} for key in keys[target]}


def size_of(deepspeed: config.DeepSpeedConfig, key: str) -> float:
    """One of SIZES, with overrides. Raises ConfigError if it is not a number: YAML reads 2e8 as text."""
    zero = deepspeed.overrides.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(
            f"deepspeed.overrides: zero_optimization ({zero!r}) must be a mapping; add keys, or remove it"
        )
    value = zero.get(key, "auto")
    if value == "auto":
        return SIZES[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ConfigError(
            f"deepspeed.overrides.zero_optimization.{key} ({value!r}) is not a number; write it like 200000000 or 2.0e+8"
        )
    return float(value)


def owns_optimizer(train: config.TrainConfig, deepspeed: config.DeepSpeedConfig) -> bool:
    """Whether ftray's `adamw.AdamW` is used: at stage 0, where nothing is sharded."""
    return deepspeed.zero_stage == 0 and train.precision in ("bf16", "fp32")


def _has_key(tree: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(tree, dict) and first in tree and (not rest or _has_key(tree[first], rest))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if not isinstance(merged.get(key), dict):
            merged[key] = value
        elif isinstance(value, dict):
            merged[key] = _merge(merged[key], value)
        else:
            raise ConfigError(
                f"deepspeed.overrides: {key} ({value!r}) must be a mapping; it is merged with {merged[key]}"
            )
    return merged
