"""Our settings → DeepSpeed's config: what the run file decides can't be overridden, the rest is merged."""

from typing import Any

import pytest
import yaml

from ftray.config import DeepSpeedConfig, TrainConfig
from ftray.errors import ConfigError
from ftray.train.zero.config import OWNED, SIZES, deepspeed_config, size_of


def made(
    zero_stage: int = 2, overrides: dict[str, Any] | None = None, offload: Any = "none", **train: Any
) -> dict[str, Any]:
    section = TrainConfig(**{"global_batch_size": 24, "micro_batch_size": 3, **train})
    return deepspeed_config(
        section, DeepSpeedConfig(zero_stage=zero_stage, offload=offload, overrides=overrides or {}), 3, 2
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_batch_sizes_stage_and_clipping_follow_the_run_file(stage: int) -> None:
    found = made(stage, max_grad_norm=0.5)
    assert found["zero_optimization"]["stage"] == stage
    assert found["gradient_clipping"] == (0.5 if stage else 0.0)  # at stage 0 our optimizer clips
    sizes = [found[k] for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert sizes == [24, 3, 4]
    assert sizes[0] == sizes[1] * sizes[2] * 2


def test_at_stage_0_deepspeed_keeps_no_masters_and_sums_gradients_in_their_own_precision() -> None:
    found = made(0, precision="bf16")
    assert found["bf16"]["enabled"] is False
    assert found["communication_data_type"] == "bf16"
    assert "communication_data_type" not in made(0, precision="fp32")


def test_precision_is_bf16_or_fp16_with_a_scale_that_is_searched_or_nothing() -> None:
    assert made(precision="bf16")["bf16"]["enabled"] is True
    assert made(precision="fp32")["bf16"]["enabled"] is False
    assert "fp16" not in made()
    half = made(precision="fp16")
    assert (half["bf16"]["enabled"], half["fp16"]["enabled"], half["fp16"]["loss_scale"]) == (False, True, 0)


def test_offload_moves_the_optimizer_or_the_weights_too() -> None:
    zero = {what: made(3, offload=what)["zero_optimization"] for what in ("none", "optimizer", "all")}
    assert "offload_optimizer" not in zero["none"]
    assert zero["optimizer"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in zero["optimizer"]
    assert zero["all"].keys() == {"stage", "offload_optimizer", "offload_param"}


def test_overrides_are_merged_key_by_key_and_leave_their_neighbours() -> None:
    overrides = {
        "zero_optimization": {"overlap_comm": False, "leaf_module": {"names": ["a"]}},
        "comms_logger": {"enabled": True},
    }
    found = made(3, overrides)
    assert found["zero_optimization"] == {"stage": 3, "overlap_comm": False, "leaf_module": {"names": ["a"]}}
    assert found["comms_logger"] == {"enabled": True}
    assert {k: v for k, v in found.items() if k not in overrides} == {
        k: v for k, v in made(3).items() if k not in overrides
    }


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ("null", r"zero_optimization \(None\) must be a mapping"),
        ("[1]", r"zero_optimization \(\[1\]\) must be a mapping"),
        ("{reduce_bucket_size: 2e8}", r"reduce_bucket_size \('2e8'\) is not a number; .* 2\.0e\+8"),
        ("{reduce_bucket_size: null}", r"reduce_bucket_size \(None\) is not a number"),
        ("{stage3_max_live_parameters: true}", r"stage3_max_live_parameters \(True\) is not a number"),
        ("{stage3_prefetch_bucket_size: -1}", r"stage3_prefetch_bucket_size \(-1\) is not a number"),
    ],
)
def test_sizes_that_are_none_are_refused(zero: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(3, yaml.safe_load(f"zero_optimization: {zero}"))


def test_sizes_are_those_that_deepspeed_takes() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key, size in SIZES.items():
        name = {
            "stage3_max_live_parameters": "max_live_parameters",
            "stage3_prefetch_bucket_size": "prefetch_bucket_size",
        }
        usual = DeepSpeedZeroConfig.model_fields[name.get(key, key)].default
        assert usual == size
        for value, wanted in (("auto", size), (3, 3.0), (2.0e8, 2e8)):
            assert size_of(DeepSpeedConfig(overrides={"zero_optimization": {key: value}}), key) == wanted
    assert size_of(DeepSpeedConfig(), "reduce_bucket_size") == 5e8


def test_overrides_of_the_run_file_are_left_as_they_are() -> None:
    overrides = {"zero_optimization": {"overlap_comm": False}}
    made(2, overrides)
    assert overrides == {"zero_optimization": {"overlap_comm": False}}


@pytest.mark.parametrize("key", OWNED)
def test_what_a_key_of_the_run_file_decides_is_refused_naming_that_key(key: str) -> None:
    *above, leaf = key.split(".")
    overrides: dict[str, Any] = {leaf: 1}
    for part in reversed(above):
        overrides = {part: overrides}
    with pytest.raises(ConfigError) as caught:
        made(2, overrides)
    assert str(caught.value) == f"deepspeed.overrides.{key} is set by {OWNED[key]}; change that instead"


@pytest.mark.parametrize("value", [2, "stage 2", None])
def test_a_mapping_can_not_be_replaced_by_something_else(value: object) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed\.overrides: zero_optimization \(.*\) must be a mapping"):
        made(2, {"zero_optimization": value})


def test_what_is_decided_elsewhere_names_keys_that_exist() -> None:
    assert {"zero_optimization.stage", "train_batch_size", "optimizer", "fp16"} <= set(OWNED)
    for names in OWNED.values():
        for name in names.split(" and "):
            section, leaf = name.split(".")
            assert leaf in {"train": TrainConfig, "deepspeed": DeepSpeedConfig}[section].model_fields
