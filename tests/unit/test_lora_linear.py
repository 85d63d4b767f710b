"""The fused LoRA layer is PEFT's layer with fewer passes: the same values, gradients and parameter names."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftray import config
from ftray.model.lora import add_adapters
from ftray.model.lora_dropout import SeededDropout
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


def test_with_dropout_its_gradients_are_those_of_the_dropped_input() -> None:
    x, a, b = _tensors((2, 5, 8), (3, 8), (6, 3))
    frozen = DenseLayer(SimpleNamespace(weight=_tensors((6, 8))[0].detach(), bias=None))
    dropout = SeededDropout(0.3, seed=5)

    def fused(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return LoraFunction.apply(x, frozen, a, b, 2.0, dropout)

    kept = dropout.mask(10, 8, x.device).view(2, 5, 8).double() / 0.7
    plain = x @ frozen.layer.weight.T + 2.0 * (x * kept @ a.T) @ b.T
    assert torch.allclose(fused(x, a, b), plain, rtol=1e-12)
    assert torch.autograd.gradcheck(fused, (x, a, b))


def test_dropout_keeps_a_share_of_elements_that_seed_row_and_column_choose_independently() -> None:
    rows, columns = 2000, 1000
    masks = torch.stack(
        [SeededDropout(0.1, seed).mask(rows, columns, torch.device("cpu")) for seed in (0, 1, 2**31 - 1)]
    )
    kept = masks.double()
    deviation = math.sqrt(0.1 * 0.9)
    assert kept.mean(dim=(1, 2)).tolist() == pytest.approx([0.9] * 3, abs=5 * deviation / math.sqrt(rows * columns))
    for axis, length in ((2, columns), (1, rows)):  # of each row, of each column
        assert (kept.mean(dim=axis) - 0.9).abs().max() < 6 * deviation / math.sqrt(length)
    centered = (kept - 0.9) / deviation
    pairs = {
        "seeds": centered[0] * centered[1],
        "rows": centered[0, 1:] * centered[0, :-1],
        "columns": centered[0, :, 1:] * centered[0, :, :-1],
        "rows 64 apart": centered[0, 64:] * centered[0, :-64],
    }
    for product in pairs.values():
        assert abs(float(product.mean())) < 5 / math.sqrt(product.numel())
    assert torch.equal(masks[0], SeededDropout(0.1, 0).mask(rows, columns, torch.device("cpu")))


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
