"""The fused LoRA layer is PEFT's layer with fewer passes: the same values, gradients and parameter names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftray import config
from ftray.model.lora import add_adapters
from ftray.model.lora_linear import DenseLayer, FusedLoraLinear, LoraFunction
from tests import tiny


def _tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("with_bias", [False, True])
def test_its_gradients_are_those_of_the_formula(with_bias: bool) -> None:
    x, a, b = _tensors((2, 5, 8), (3, 8), (6, 3))
    weight, bias = (t.detach() for t in _tensors((6, 8), (6,)))
    frozen = DenseLayer(SimpleNamespace(weight=weight, bias=bias if with_bias else None))

    def fused(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return LoraFunction.apply(x, frozen, a, b, 2.0)

    plain = x @ weight.T + 2.0 * (x @ a.T) @ b.T + (bias if with_bias else 0)
    assert torch.allclose(fused(x, a, b), plain, rtol=1e-12)
    assert torch.autograd.gradcheck(fused, (x, a, b))


def test_a_first_layer_gets_no_gradient_for_its_input_and_none_is_made() -> None:
    x, a, b = _tensors((4, 8), (3, 8), (6, 3))
    frozen = DenseLayer(SimpleNamespace(weight=torch.zeros(6, 8, dtype=torch.float64), bias=None))
    out = LoraFunction.apply(x.detach(), frozen, a, b, 1.0)
    out.sum().backward()
    assert x.grad is None
    assert a.grad is not None


def test_adapters_keep_pefts_names_whichever_layer_carries_them(monkeypatch: pytest.MonkeyPatch) -> None:
    method = config.MethodConfig(rank=4)
    ours = add_adapters(tiny.make_model(), method, seed=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fused = add_adapters(tiny.make_model(), method, seed=0)
    assert any(isinstance(m, FusedLoraLinear) for m in fused.modules())
    assert list(ours.state_dict()) == list(fused.state_dict())
    ids = torch.arange(6)[None]
    assert torch.equal(ours(input_ids=ids).logits, fused(input_ids=ids).logits)
