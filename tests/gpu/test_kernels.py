"""On a GPU: our kernels give what eager PyTorch gives, and documents don't see each other. `pytest -m gpu tests/gpu`"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftray import config
from ftray.model.attention import VARLEN, choose_attention
from ftray.model.lora import add_adapters
from ftray.train.loss import LinearCrossEntropy, MicroBatch, SummedLoss, flatten_rows
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (37, 5, 64, 22)


def _batch(lengths: tuple[int, ...], seed: int = 0) -> MicroBatch:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    ids = rng.integers(2, tiny.VOCAB_SIZE, (1, total)).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    labels = np.roll(ids, -1, axis=1)
    labels[0, np.cumsum(lengths) - 1] = -100
    return flatten_rows(ids, labels, positions, np.array([total], np.int32), "cuda")


def _model(attention: str) -> torch.nn.Module:
    model = tiny.make_model(dtype=torch.bfloat16)
    model.set_attn_implementation(attention)
    return model.cuda()


def test_varlen_attention_is_chosen_and_equals_sdpa_within_rounding() -> None:
    assert choose_attention(tiny.make_model().config) == VARLEN
    batch = _batch(LENGTHS)
    losses = {name: float(SummedLoss(_model(name))(*vars(batch).values())) for name in (VARLEN, "sdpa")}
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
    loss, batch = SummedLoss(_model(VARLEN)), _batch(LENGTHS)
    packed, single, at = float(loss(*vars(batch).values())), 0.0, 0
    for n in LENGTHS:
        part = slice(at, at + n)
        cu = torch.tensor([0, n], dtype=torch.int32, device="cuda")
        one = MicroBatch(batch.input_ids[:, part], batch.labels[:, part], batch.position_ids[:, part], cu, n)
        single += float(loss(*vars(one).values()))
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


def test_fused_lora_follows_pefts_layer() -> None:
    losses = []
    for fused in (True, False):
        model = add_adapters(_model("sdpa"), config.Method(rank=4), seed=0).cuda()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator("cuda").manual_seed(1))
        if not fused:
            for module in model.modules():
                if hasattr(module, "lora_dropout") and module.lora_dropout:
                    module.lora_dropout["default"] = torch.nn.Dropout(0.0)  # sends it down PEFT's path
        losses.append(float(SummedLoss(model)(*vars(_batch(LENGTHS)).values())))
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
