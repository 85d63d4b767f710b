"""Model families: which one a config belongs to, and what it decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ftray import config
from ftray.model.families import ModelFamily, base, family_of, register


@pytest.mark.parametrize(
    ("kind", "family", "experts"),
    [
        ("llama", "dense", None),
        ("gemma2", "dense", None),
        ("mixtral", "mixture of experts", "num_local_experts"),
        ("qwen3_moe", "mixture of experts", "num_experts"),
        ("deepseek_v3", "mixture of experts", "n_routed_experts"),
        ("jamba", "hybrid", "num_experts"),
        ("falcon_mamba", "hybrid", None),
        ("qwen3_next", "hybrid", "num_experts"),
    ],
)
def test_a_config_has_a_family_as_an_object_and_as_a_dictionary(kind: str, family: str, experts: str | None) -> None:
    settings = AutoConfig.for_model(kind)
    for each in (settings, settings.to_dict()):
        assert family_of(each).name == family
        if experts is not None:
            assert family_of(each).unplanned in ("num_experts", "num_local_experts", "n_routed_experts")
        else:
            assert family_of(each).unplanned is None


def test_a_registered_family_takes_precedence_by_type(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(ModelFamily):
        name = "own"

    monkeypatch.setattr(base, "_BY_TYPE", dict(base._BY_TYPE))
    register(Own, model_types=("mixtral",))
    assert family_of({"model_type": "mixtral", "num_local_experts": 8}).name == "own"
    assert family_of({"text_config": {"model_type": "mixtral"}}).name == "own"
    assert family_of({"model_type": "unheard_of"}).name == "dense"


def test_a_family_decides_on_documents_adapters_8_bits_and_leaks() -> None:
    family = family_of({"model_type": "llama"})
    assert family.document_inputs(torch.tensor([0, 4], dtype=torch.int32), 4) == {}, "CPUs build a mask from positions"
    method: Any = config.MethodConfig()
    assert family.adapter_targets(method) == "all-linear"
    layers = ("mlp.up_proj", "self_attn.q_proj", "mlp.gate", "mlp.router.linear", "attention.dense")
    assert [family.computes_in_8_bits(layer) for layer in layers] == [True, False, False, False, False]
    assert family.max_leak(in_fp32=True) < family.max_leak(in_fp32=False)
