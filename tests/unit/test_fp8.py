"""Products in 8 bits: near the layers that they stand for, refused where they can't be had."""

from __future__ import annotations

import pytest
import torch

from ftray import config
from ftray.errors import ConfigError
from ftray.model.fp8 import (
    FORMATS,
    FP8,
    INT8,
    FrozenLinear,
    NumberFormat,
    TrainedLinear,
    check_device,
    quantize_columns,
    quantize_rows,
    use_eight_bits,
)
from ftray.model.lora import add_adapters, trainable
from tests import tiny

CPU = torch.device("cpu")
FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


@FORMAT
def test_rows_are_scaled_to_their_largest_value(format: NumberFormat) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    x[3], x[4] = x[3] * 1000, 0.0
    codes, scale = quantize_rows(x, format)
    found = codes.float() * scale
    assert codes.dtype == format.dtype
    assert ((found - x).norm(dim=1) <= 0.03 * x.norm(dim=1)).all()
    top = format.largest
    assert torch.equal(codes.float().abs().amax(1), torch.tensor([top] * 4 + [0.0] + [top] * 4))


def test_whole_numbers_are_the_nearest() -> None:
    x = torch.linspace(-127, 127, 1001)[None]
    codes, scale = quantize_rows(x, INT8)
    assert ((codes.float() * scale - x).abs() <= 0.5 + 1e-4).all()


@FORMAT
def test_columns_are_rows_of_the_transposed(format: NumberFormat) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_columns(x, format)
    assert (codes.shape, scale.shape) == ((64, 9), (64, 1))
    assert ((codes.float() * scale).T - x).norm() <= 0.03 * x.norm()


@FORMAT
def test_product_and_gradient_are_near_the_layers(format: NumberFormat) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    linear.weight.data[5] *= 50  # a row with values of its own size keeps its neighbours' precision
    x = torch.randn(2, 7, 64, requires_grad=True)
    out = FrozenLinear(linear, format)(x)
    assert (out - linear(x)).norm() < 0.05 * linear(x).norm()
    (grad,) = torch.autograd.grad(out.sum(), x)
    (wanted,) = torch.autograd.grad(linear(x).sum(), x)
    assert (grad - wanted).norm() < 0.05 * wanted.norm()


def test_under_int8_a_layer_that_narrows_keeps_its_product_and_not_its_gradient() -> None:
    torch.manual_seed(0)
    for sizes, kind, is_exact in (((64, 32), INT8, True), ((32, 64), INT8, False), ((64, 32), FP8, False)):
        linear = torch.nn.Linear(*sizes)
        layer, x = FrozenLinear(linear, kind), torch.randn(5, sizes[0], requires_grad=True)
        out = layer(x)
        assert torch.equal(out, linear(x)) == is_exact
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert not torch.equal(grad, torch.autograd.grad(linear(x).sum(), x)[0])


def test_a_trained_layer_gives_near_gradients_of_its_input_and_exact_ones_of_its_weight() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    layer = TrainedLinear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    x, slope = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 32)
    grads = [torch.autograd.grad((each(x) * slope).sum(), [x, linear.weight, linear.bias]) for each in (layer, linear)]
    (x_grad, *own), (wanted, *exact) = grads
    assert 0 < (x_grad - wanted).norm() < 0.05 * wanted.norm()
    for found, other in zip(own, exact, strict=True):
        assert torch.allclose(found, other, rtol=1e-5, atol=1e-5)


def test_a_trained_layer_rounds_its_weight_anew_after_each_update() -> None:
    layer, x = TrainedLinear(torch.nn.Linear(16, 16, bias=False)), torch.randn(4, 16)
    first = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.allclose(layer(x), first * 2)


def test_an_input_changed_in_place_is_scaled_anew() -> None:
    layer, x = FrozenLinear(torch.nn.Linear(16, 16, bias=False), FP8), torch.randn(4, 16)
    first = layer.product(x)
    assert torch.equal(layer.product(x), first)
    x.mul_(2)
    assert torch.allclose(layer.product(x), first * 2)


def test_a_square_input_and_its_transposed_are_two() -> None:
    layer, x = FrozenLinear(torch.nn.Linear(16, 16, bias=False), FP8), torch.randn(16, 16)
    first = layer.product(x)
    assert (layer.product(x.T) - first).norm() > 0.5 * first.norm()


def test_one_input_read_in_two_formats_is_scaled_for_each() -> None:
    linear, x = torch.nn.Linear(16, 16, bias=False), torch.randn(4, 16)
    for kind in (FP8, INT8, FP8):
        assert torch.allclose(FrozenLinear(linear, kind).product(x), linear(x), atol=0.1)


@FORMAT
def test_only_the_base_of_adapters_is_replaced_and_nothing_of_it_is_trained_or_saved(format: NumberFormat) -> None:
    method = config.MethodConfig.model_validate({"rank": 4, "base_precision": format.name})
    model = add_adapters(tiny.make_model(), method, seed=0)
    before = set(trainable(model))
    assert use_eight_bits(model, method, CPU) == 3
    names = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    mlp = "base_model.model.model.layers.0.mlp"  # attention, and all of the last of two blocks, stay as they are
    assert names == [f"{mlp}.{kind}_proj.base_layer" for kind in ("gate", "up", "down")]
    assert {model.get_submodule(name).format for name in names} == {format}
    assert set(trainable(model)) == before
    assert all("lora_" in name for name in before)
    assert type(model.get_base_model().lm_head) is torch.nn.Linear
    ids = torch.arange(2, 8)[None]
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_in_full_fine_tuning_the_blocks_layers_are_replaced_under_their_own_names_and_learn() -> None:
    model, method = tiny.make_model(), config.MethodConfig(type="full", base_precision="fp8")
    before = dict(model.named_parameters())
    assert use_eight_bits(model, method, CPU) == 3
    found = [name for name, module in model.named_modules() if isinstance(module, TrainedLinear)]
    assert found == [f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p for name, p in before.items())
    ids = torch.arange(2, 40)[None]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_router_and_layers_of_odd_sides_stay_as_they_are() -> None:
    model, method = tiny.make_model(), config.MethodConfig(type="full", base_precision="fp8")
    mlp = model.model.layers[0].mlp
    mlp.gate, mlp.up_proj = torch.nn.Linear(64, 16), torch.nn.Linear(64, 24)
    assert use_eight_bits(model, method, CPU) == 2


@pytest.mark.parametrize(("format", "words"), [(FP8, r"9\.0 \(H100\)"), (INT8, r"8\.0 \(A100\)")])
def test_it_is_refused_by_name_where_the_device_cannot(format: NumberFormat, words: str) -> None:
    wanted = rf"method\.base_precision {format.name} needs a GPU of compute capability {words} or newer, this worker has a CPU"
    with pytest.raises(ConfigError, match=wanted):
        check_device(format, CPU)


def test_how_memory_is_saved_is_no_part_of_a_runs_identity() -> None:
    tree = {"name": "t", "model": {"base": "b"}, "data": {"train": [{"path": "p"}]}}
    plain = config.parse_run(tree, "test")
    assert (
        config.parse_run({**tree, "train": {"gradient_checkpointing": "full"}}, "test").config_hash == plain.config_hash
    )
    eight = {"train": {"optimizer": "adamw-8bit"}, "deepspeed": {"zero_stage": 0}}
    zero = config.parse_run({**tree, "deepspeed": {"zero_stage": 0}}, "test")
    assert config.parse_run({**tree, **eight}, "test").config_hash != zero.config_hash
