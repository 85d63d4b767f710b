"""On a GPU: our kernels give what eager PyTorch gives, and documents don't see each other. `pytest -m gpu tests/gpu`"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ftray import config
from ftray.model.attention import VARLEN, choose_attention
from ftray.model.fp8 import (
    FP8,
    INT8,
    FrozenLinear,
    NumberFormat,
    TrainedLinear,
    quantize_columns,
    quantize_rows,
    use_eight_bits,
)
from ftray.model.lora import add_adapters, build_model, trainable
from ftray.model.lora_dropout import SeededDropout
from ftray.train.batch import Batch, collate
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import LinearCrossEntropy, Sft
from ftray.train.optim import adamw
from ftray.train.optim.adamw import AdamW, whole
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (37, 5, 64, 22)


def _batch(lengths: tuple[int, ...], seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    ids = rng.integers(2, tiny.VOCAB_SIZE, (1, total)).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    labels = np.roll(ids, -1, axis=1)
    labels[0, np.cumsum(lengths) - 1] = -100
    return collate(ids, labels, positions, np.array([total], np.int32), "cuda")


def _model(attention: str) -> torch.nn.Module:
    model = tiny.make_model(dtype=torch.bfloat16)
    model.set_attn_implementation(attention)
    return model.cuda()


def test_varlen_attention_is_chosen_and_equals_sdpa_within_rounding() -> None:
    assert choose_attention(tiny.make_model().config) == VARLEN
    batch = _batch(LENGTHS)
    losses = {name: float(ObjectiveModel(_model(name), Sft())(batch)[0]) for name in (VARLEN, "sdpa")}
    assert losses[VARLEN] == pytest.approx(losses["sdpa"], rel=5e-3)


def test_documents_do_not_see_each_other() -> None:
    choose_attention(tiny.make_model().config)
    model, batch = _model(VARLEN), _batch(LENGTHS)
    inputs = {"position_ids": batch.position_ids, "use_cache": False}
    inputs |= {"cu_seq_lens_q": batch.cu_seqlens, "max_length_q": batch.max_length}
    with torch.no_grad():
        before = model(input_ids=batch.input_ids, **inputs).logits
        changed = batch.input_ids.clone()
        changed[0, : LENGTHS[0]] = 3
        after = model(input_ids=changed, **inputs).logits
    assert not torch.equal(before[0, : LENGTHS[0]], after[0, : LENGTHS[0]])
    assert torch.equal(before[0, LENGTHS[0] :], after[0, LENGTHS[0] :])


def test_packed_loss_equals_the_sum_of_single_documents() -> None:
    choose_attention(tiny.make_model().config)
    loss, batch = ObjectiveModel(_model(VARLEN), Sft()), _batch(LENGTHS)
    packed, single, at = float(loss(batch)[0]), 0.0, 0
    for n in LENGTHS:
        part = slice(at, at + n)
        cu = torch.tensor([0, n], dtype=torch.int32, device="cuda")
        one = Batch(batch.input_ids[:, part], batch.labels[:, part], batch.position_ids[:, part], cu, n)
        single += float(loss(one)[0])
        at += n
    assert packed == pytest.approx(single, rel=2e-3)


def test_linear_cross_entropy_equals_eager_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5000, 64, device="cuda", requires_grad=True)
    weight = torch.randn(700, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 700, (5000,), device="cuda")
    ours = LinearCrossEntropy.apply(hidden, weight, targets)
    ours.backward()
    grads = (hidden.grad.clone(), weight.grad.clone())
    hidden.grad = weight.grad = None
    eager = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    eager.backward()
    assert float(ours) == pytest.approx(float(eager), rel=1e-5)
    for mine, theirs in zip(grads, (hidden.grad, weight.grad), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def use_pefts_forward(model: torch.nn.Module) -> None:
    """Makes the adapters' layers those of PEFT, with the same parameters."""
    for module in model.modules():
        if type(module).__name__.startswith("FusedLora"):
            module.__class__ = type(module).__bases__[0]


def test_fused_lora_follows_pefts_layer() -> None:
    losses = []
    for fused in (True, False):
        model = add_adapters(_model("sdpa"), config.MethodConfig(rank=4), seed=0).cuda()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator("cuda").manual_seed(1))
        if not fused:
            use_pefts_forward(model)
        losses.append(float(ObjectiveModel(model, Sft())(_batch(LENGTHS))[0]))
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize(
    ("num_tokens", "num_columns", "rank", "p"), [(300, 264, 8, 0.05), (4096, 4096, 16, 0.1), (64, 128, 33, 0.6)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_drop_the_elements_of_the_seed(
    dtype: torch.dtype, num_tokens: int, num_columns: int, rank: int, p: float
) -> None:
    torch.manual_seed(0)
    dropout = SeededDropout(p, 2**31 - 1)
    x, a, grad_low, grad_x = (
        torch.randn(shape, device="cuda").to(dtype)
        for shape in ((num_tokens, num_columns), (rank, num_columns), (num_tokens, rank), (num_tokens, num_columns))
    )
    kept = dropout.mask(num_tokens, num_columns, x.device) * dropout.scale
    near = 1e-5 if dtype == torch.float32 else 5e-3
    for ours, exact in (
        (dropout.project(x, a), (x.double() * kept) @ a.double().T),
        (dropout.gradient_of_a(grad_low, x), grad_low.double().T @ (x.double() * kept)),
        (
            dropout.add_gradient_of_x(grad_x.clone(), grad_low, a),
            grad_x.double() + kept * (grad_low.double() @ a.double()),
        ),
    ):
        assert (ours.double() - exact).norm() < near * exact.norm()


def test_dropout_stays_on_the_fused_path_and_hangs_on_the_seed_alone() -> None:
    method = config.MethodConfig(rank=4, dropout=0.2)
    model = add_adapters(_model("sdpa"), method, seed=0).cuda().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator("cuda").manual_seed(1))
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        torch.cuda.manual_seed(seed + len(losses))  # not used
        losses.append(float(ObjectiveModel(model, Sft()).train()(_batch(LENGTHS))[0].detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("moments", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_optimizers_kernel_is_its_text(dtype: torch.dtype, moments: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(300, 333, generator=generator).to(dtype).to(device))
        optimizer = AdamW([p], 1e-2, 0.1, 1.0, moments)
        for _ in range(4):
            p.grad = torch.randn(300, 333, generator=generator).to(dtype).to(device)
            optimizer.step()
        state = {"weights": whole(p, optimizer.state[p]), **optimizer.state[p]}
        found.append({kind: t.detach().float().cpu() for kind, t in state.items()})
    cpu, gpu = found
    assert (cpu["weights"] - gpu["weights"]).abs().max() < 1e-3
    assert ((cpu["weights"] - gpu["weights"]).abs() > 1e-6).float().mean() < 0.01
    for kind in ("exp_avg", "exp_avg_sq"):
        allowed = 1.0 if moments == "adamw-8bit" else 1e-6
        assert (cpu[kind] - gpu[kind]).abs().max() <= allowed


def test_small_parameters_in_one_launch_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, dtypes = [(16, 4096), (1, 1), (333, 7), (14336, 16), (5000, 1000)], [torch.bfloat16, torch.float32]
    found = []
    for small in (adamw.SMALL, 0):
        monkeypatch.setattr(adamw, "SMALL", small)
        generator = torch.Generator().manual_seed(0)
        ps = [
            torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype).cuda())
            for size in sizes
            for dtype in dtypes
        ]
        optimizer = AdamW(ps, 1e-2, 0.1, 1.0)
        for step in range(4):
            for n, p in enumerate(ps):
                grad = torch.randn(p.shape[::-1], generator=generator).to(p.dtype).cuda().T
                p.grad = None if n == step else grad  # one isn't touched, the others' aren't contiguous
            optimizer.step()
        found.append([t for p in ps for t in (p.detach(), *optimizer.state[p].values())])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("moments", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_paged_moments_live_in_the_hosts_memory_and_change_no_bit(dtype: torch.dtype, moments: str) -> None:
    found = []
    for name in (moments, f"{moments}-paged"):
        generator = torch.Generator().manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(n, 2048, generator=generator).to(dtype).cuda()) for n in (3000, 1, 2000)]
        optimizer = AdamW(ps, 1e-2, 0.1, 1.0, name)
        for _ in range(4):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype).cuda()
            optimizer.step()
            # At once, as a checkpoint reads them: nothing may be under way any more.
            seen = [{kind: t.to("cpu", copy=True) for kind, t in optimizer.state[p].items()} for p in ps]
        found.append((seen, [p.detach().cpu() for p in ps]))
        places = {t.device.type for p in ps for kind, t in optimizer.state[p].items() if kind != "rest"}
        assert places == ({"cpu"} if name.endswith("-paged") else {"cuda"})
    (seen, weights), (paged, same) = found
    assert all(map(torch.equal, weights, same))
    for a, b in zip(seen, paged, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[kind], b[kind]) for kind in a)


def test_linear_cross_entropy_in_bf16_is_eager_within_rounding() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(32000, 256, device="cuda") / 8).bfloat16().requires_grad_()
    targets = torch.randint(0, 32000, (5000,), device="cuda")
    (LinearCrossEntropy.apply(hidden, weight, targets) / 5000).backward()
    grads = hidden.grad.float(), weight.grad.float()
    h, w = (t.detach().float().requires_grad_() for t in (hidden, weight))
    loss = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="sum")
    (loss / 5000).backward()
    assert float(LinearCrossEntropy.apply(hidden, weight, targets)) == pytest.approx(float(loss), rel=2e-3)
    for mine, theirs in zip(grads, (h.grad, w.grad), strict=True):
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()


hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)


FORMAT = pytest.mark.parametrize("format", [pytest.param(FP8, marks=hopper, id="fp8"), pytest.param(INT8, id="int8")])


@FORMAT
def test_8_bit_rows_and_columns_are_those_of_the_text_and_products_are_near(format: NumberFormat) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, 3072, device="cuda").bfloat16()
    x[3] *= 100
    for kernel in (quantize_rows, quantize_columns):
        codes, scale = kernel(x, format)
        wanted, wanted_scale = kernel(x.cpu(), format)
        assert torch.allclose(scale.cpu(), wanted_scale, rtol=1e-6)
        assert (codes.cpu().float() != wanted.float()).float().mean() < 1e-3
    linear = torch.nn.Linear(3072, 1024, bias=False).cuda().bfloat16()
    layer = FrozenLinear(linear, format)
    for rows in (70, 3):  # torch's own product of int8 takes 17 and more
        y = x[:rows].clone().requires_grad_()
        ours, theirs = layer(y), linear(y)
        assert (ours - theirs).float().norm() < 0.05 * theirs.float().norm()
        grad = torch.randn_like(ours)
        (found,) = torch.autograd.grad(ours, y, grad)
        wanted = grad.float() @ linear.weight.float()
        assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


@hopper
def test_a_trained_fp8_layer_has_near_gradients() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(3072, 1024).cuda().bfloat16()
    layer, grads = TrainedLinear(linear), []
    x = torch.randn(2, 35, 3072, device="cuda").bfloat16().requires_grad_()
    slope = torch.randn(2, 35, 1024, device="cuda").bfloat16()
    for each in (layer, linear):
        out = each(x)
        grads.append([out, *torch.autograd.grad(out, [x, linear.weight, linear.bias], slope)])
    for (ours, theirs), apart in zip(zip(*grads, strict=True), (0.05, 0.05, 0.01, 0.01), strict=True):
        assert (ours.float() - theirs.float()).norm() < apart * theirs.float().norm()


@FORMAT
def test_8_bit_layers_beside_each_other_share_rows_only_of_the_same_input(format: NumberFormat) -> None:
    layer = FrozenLinear(torch.nn.Linear(64, 32, bias=False).cuda().bfloat16(), format)
    x = torch.randn(16, 64, device="cuda").bfloat16()
    first, again = layer.product(x), layer.product(x)
    assert torch.equal(first, again)
    x.mul_(2)
    assert torch.allclose(layer.product(x), first * 2, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("base", ["nf4", "int8", pytest.param("fp8", marks=hopper)])
def test_fused_lora_over_a_small_base_follows_pefts_layer(base: str, tmp_path: Path) -> None:
    directory = tiny.write_tiny_model(tmp_path, dtype=torch.bfloat16)
    found = []
    for fused in (True, False):
        settings = {"type": "qlora"} if base == "nf4" else {"type": "lora", "base_precision": base}
        method = config.MethodConfig.model_validate({**settings, "rank": 4})
        model = build_model(config.ModelConfig(base=str(directory)), method, "bf16", 0)
        if base != "nf4":
            assert use_eight_bits(model, method, torch.device("cuda")) == 3
        model = model.cuda().train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator("cuda").manual_seed(1))
        kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}
        assert kinds == {"FusedLoraLinear4bit" if base == "nf4" else "FusedLoraLinear"}
        if not fused:
            use_pefts_forward(model)
        loss = ObjectiveModel(model, Sft())(_batch(LENGTHS))[0]
        loss.backward()
        found.append((float(loss), torch.cat([p.grad.float().flatten() for p in trainable(model).values()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-3)
    assert (found[0][1] - found[1][1]).norm() < 0.1 * found[1][1].norm()
