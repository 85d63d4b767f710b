"""Documents of a row are kept apart, or the model is refused: families of models, tiny and with random weights.

And what a model asks of its attention is done: each family by its own eager attention.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ftray import config
from ftray.engine.transformers.engine import _max_positions as max_positions
from ftray.errors import ModelError
from ftray.model import attention
from ftray.model.attention import VARLEN, choose_attention
from ftray.model.families import ModelFamily
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import Sft
from ftray.train.packing_check import check_packing, leak
from tests.unit.test_output_head import build

LIMIT, LIMIT_16_BIT = ModelFamily.max_leaks
CPU = torch.device("cpu")


def run_of(**sections: Any) -> config.RunConfig:
    tree = {"name": "a", "model": {"base": "org/b"}, "data": {"train": [{"path": "p"}]}}
    return config.parse_run({**tree, "train": {"global_batch_size": 4}, **sections}, "test")


APART = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi", "phi3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*APART, "olmo2", "smollm3", "gpt2", "gpt_neox"])
def test_families_that_keep_documents_apart_pass(kind: str, dtype: torch.dtype) -> None:
    loss = ObjectiveModel(build(kind).to(dtype), Sft()).train()
    assert leak(loss, CPU) < LIMIT / 10
    assert loss.training
    check_packing(run_of(), loss, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["jamba", "nemotron_h", "recurrent_gemma", "minimax", "falcon_mamba", "opt"])
def test_families_that_do_not_are_refused_where_a_row_holds_several(kind: str, dtype: torch.dtype) -> None:
    loss = ObjectiveModel(build(kind).to(dtype), Sft()).train()
    assert leak(loss, CPU) > 5 * LIMIT_16_BIT
    with pytest.raises(
        ModelError,
        match=rf"model.base org/b \({kind}\) cannot be packed: a document changes the loss of the next one .*Use another base",
    ):
        check_packing(run_of(), loss, CPU)
    with pytest.raises(ModelError):
        check_packing(run_of(data={"train": [{"path": "p"}], "packing": False}), loss, CPU)
    alone = {"data": {"train": [{"path": "p"}], "packing": False}}
    with pytest.raises(ModelError):  # evaluation packs them all the same
        check_packing(run_of(**alone, train={"global_batch_size": 4, "micro_batch_size": 1}), loss, CPU)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
ROPES = [
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}, 32),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, 64),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, None),
]


@pytest.mark.parametrize(("kind", "more", "steady"), ROPES)
def test_frequencies_that_hang_on_the_longest_document_are_refused_beyond_their_border(
    kind: str, more: dict[str, Any], steady: int | None
) -> None:
    loss = ObjectiveModel(build(kind, **more), Sft()).train()
    data: dict[str, Any] = {"train": [{"path": "p"}]}
    check_packing(run_of(data={**data, "max_seq_len": steady or 4096}), loss, CPU)
    assert max_positions(loss.model) == (steady or 64)
    if steady is None:
        return
    with pytest.raises(
        ModelError, match=rf"data\.max_seq_len \({steady + 1}\) is above {steady}\. .* Lower it to {steady}, or"
    ):
        check_packing(run_of(data={**data, "max_seq_len": steady + 1}), loss, CPU)


def test_a_class_that_loses_the_documents_lengths_gets_the_attention_that_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As nemotron does on a GPU, where ftray's attention would take the row for one document."""
    use_ours(monkeypatch)
    loss = ObjectiveModel(build("llama"), Sft()).train()
    loss.model.set_attn_implementation(VARLEN)
    assert leak(loss, CPU) > LIMIT_16_BIT, "on a CPU no lengths are told"
    check_packing(run_of(), loss, CPU)
    assert loss.model.config._attn_implementation == "sdpa"
    assert leak(loss, CPU) < LIMIT / 100


def by_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    _: int,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, 0),
) -> torch.Tensor:
    """torch's kernel, which needs a GPU, in plain words. query: [tokens, heads, dim]."""
    found = []
    for lo, hi in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        q, k, v = (x[lo:hi].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        at = torch.arange(hi - lo)
        behind = at[:, None] - at[None]
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        found.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1))
    return torch.cat(found)


def use_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_varlen_attn", lambda: by_documents)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_attention(AutoConfig.for_model("llama")) == VARLEN
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_varlen_attn", lambda: by_documents)


PACKED = {"position_ids": torch.cat([torch.arange(9), torch.arange(7)])[None], "use_cache": False}
LENGTHS = {
    "cu_seq_lens_q": torch.tensor([0, 9, 16], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 9, 16], dtype=torch.int32),
    "max_length_q": 9,
    "max_length_k": 9,
}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi", "phi3", "olmo2", "gpt_neox")),
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4, "num_hidden_layers": 7}),
        ("gemma2", {"sliding_window": 4, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 3}),
        ("vaultgemma", {"sliding_window": 4, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 3}),
    ],
)
def test_what_a_model_asks_of_its_attention_is_done(
    kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_ours(monkeypatch)
    model = build(kind, **more)
    ids = torch.randint(3, 100, (1, 16), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, inputs in (("eager", PACKED), (VARLEN, PACKED | LENGTHS)):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model.get_decoder()(input_ids=ids, **inputs).last_hidden_state
        logits.square().sum().backward()
        found[name] = [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert len(found["eager"]) > 8
    for wanted, got in zip(*found.values(), strict=True):
        assert torch.allclose(wanted, got, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    if "attn_logit_softcapping" in more:
        model.set_attn_implementation("sdpa")
        uncapped = model.get_decoder()(input_ids=ids, **PACKED).last_hidden_state
        assert not torch.allclose(uncapped, found["eager"][0], rtol=1e-2), "the cap must show"


@pytest.mark.parametrize(
    ("kind", "asked"), [("gpt_oss", "s_aux"), ("mimo_v2_flash", "s_aux"), ("doge", "attention_mask")]
)
def test_what_ours_does_not_do_is_refused(kind: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_ours(monkeypatch)
    model = build(kind)
    model.set_attn_implementation(VARLEN)
    with pytest.raises(ModelError, match=f"passes {asked} to its attention, which ftray does not support on GPUs"):
        model(input_ids=torch.arange(3, 19)[None], **PACKED, **LENGTHS)


@pytest.mark.parametrize(
    ("kind", "more", "on_cpu", "on_gpu"),
    [
        ("llama", {}, "sdpa", VARLEN),
        ("gemma2", {}, "eager", VARLEN),
        ("gemma2", {"attn_logit_softcapping": None}, "sdpa", VARLEN),
        ("gpt_oss", {}, "eager", "eager"),
        ("bloom", {}, "eager", "eager"),
        ("stablelm", {}, "sdpa", "sdpa"),
    ],
)
def test_the_attention_is_one_that_the_class_takes(
    kind: str, more: dict[str, Any], on_cpu: str, on_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_varlen_attn", lambda: by_documents)
    for has_gpu, wanted in ((False, on_cpu), (True, on_gpu)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has_gpu: has)
        assert choose_attention(AutoConfig.for_model(kind, **more)) == wanted
