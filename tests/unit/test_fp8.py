"""An fp8 base: near the layer it stands for, refused where it can't be had."""

from __future__ import annotations

import pytest
import torch

from ftray import config
from ftray.errors import ConfigError
from ftray.model.fp8 import Fp8Linear, check_fp8, quantize_base, quantize_rows
from ftray.model.lora import add_adapters, trainable
from tests import tiny


def test_rows_are_scaled_to_their_largest_value() -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    x[3], x[4] = x[3] * 1000, 0.0
    codes, scale = quantize_rows(x)
    found = codes.float() * scale
    assert ((found - x).norm(dim=1) <= 0.03 * x.norm(dim=1)).all()
    assert torch.equal(codes.float().abs().amax(1), torch.tensor([448.0] * 4 + [0.0] + [448.0] * 4))


def test_product_and_gradient_are_near_the_layers() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    linear.weight.data[5] *= 50  # a row with values of its own size keeps its neighbours' precision
    x = torch.randn(2, 7, 64, requires_grad=True)
    out = Fp8Linear(linear)(x)
    assert (out - linear(x)).norm() < 0.05 * linear(x).norm()
    (grad,) = torch.autograd.grad(out.sum(), x)
    (wanted,) = torch.autograd.grad(linear(x).sum(), x)
    assert (grad - wanted).norm() < 0.05 * wanted.norm()


def test_an_input_changed_in_place_is_scaled_anew() -> None:
    layer, x = Fp8Linear(torch.nn.Linear(16, 16, bias=False)), torch.randn(4, 16)
    first = layer.product(x)
    assert torch.equal(layer.product(x), first)
    x.mul_(2)
    assert torch.allclose(layer.product(x), first * 2)


def test_only_the_base_of_adapters_is_replaced_and_nothing_of_it_is_trained_or_saved() -> None:
    model = add_adapters(tiny.make_model(), config.Method(rank=4), seed=0)
    before = set(trainable(model))
    assert quantize_base(model, torch.device("cpu")) == 3
    names = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    mlp = "base_model.model.model.layers.0.mlp"  # attention, and all of the last of two blocks, stay as they are
    assert names == [f"{mlp}.{kind}_proj.base_layer" for kind in ("gate", "up", "down")]
    assert set(trainable(model)) == before
    assert all("lora_" in name for name in before)
    assert type(model.get_base_model().lm_head) is torch.nn.Linear
    ids = torch.arange(2, 8)[None]
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_it_is_refused_by_name_where_the_device_has_no_8_bit_floats() -> None:
    with pytest.raises(ConfigError, match=r"method\.base_precision fp8 needs a GPU of compute capability 9\.0"):
        check_fp8(torch.device("cpu"))


def test_how_memory_is_saved_is_no_part_of_a_runs_identity() -> None:
    tree = {"name": "t", "model": {"base": "b"}, "data": {"train": [{"path": "p"}]}}
    plain = config.parse_run(tree, "test")
    assert config.parse_run({**tree, "train": {"recompute": "full"}}, "test").config_hash == plain.config_hash
    eight = {"train": {"optimizer": "adamw-8bit"}, "deepspeed": {"zero_stage": 0}}
    zero = config.parse_run({**tree, "deepspeed": {"zero_stage": 0}}, "test")
    assert config.parse_run({**tree, **eight}, "test").config_hash != zero.config_hash
