"""The loss in pieces is that of the model's own logits, or isn't taken: families of models, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftray.report.model_shape import read_shape
from ftray.train.batch import Batch
from ftray.train.objectives.base import ObjectiveModel, is_plain
from ftray.train.objectives.sft import Sft, _add_product

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}


def build(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **more})).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.mark.parametrize(
    ("kind", "more", "plain"),
    [
        *(
            (kind, {}, True)
            for kind in ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma", "phi3", "olmo2", "smollm3")
        ),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("gemma3_text", {}, True),
        ("gemma2", {"final_logit_softcapping": 5.0}, False),
        ("phi", {}, False),  # a bias
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {}, False),
        ("falcon_h1", {"lm_head_multiplier": 0.05}, False),
        ("recurrent_gemma", {}, False),
        ("minicpm3", {"dim_model_base": 8, "num_key_value_heads": 4}, False),
    ],
)
def test_the_loss_is_that_of_the_models_own_logits(kind: str, more: dict[str, Any], plain: bool) -> None:
    model = build(kind, **more)
    assert is_plain(model) == plain
    loss = ObjectiveModel(model, Sft())
    assert (loss.head is not None) == plain
    ids, positions = torch.randint(3, 100, (1, 16)), torch.arange(16)[None]
    labels = ids.roll(-1, 1)
    with torch.no_grad():
        found = float(loss(Batch(ids, labels, positions, torch.tensor([0, 16], dtype=torch.int32), 16))[0])
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    assert found == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum")), rel=1e-4
    )


@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen3", "phi3", "gemma2", "gemma3_text", "phi", "granite", "cohere", "cohere2", "recurrent_gemma"],
)
def test_a_plan_knows_by_the_config_whose_logits_are_whole(kind: str) -> None:
    model = build(kind)
    assert read_shape(model.config.to_dict(), kind).whole_logits == (not is_plain(model))


def test_a_class_that_is_its_own_decoder_is_not_plain() -> None:
    model = build("llama")
    model.get_decoder = lambda: model  # as Llama 4's and Mllama's do
    assert not is_plain(model)


def test_a_class_that_does_more_than_the_product_is_not_plain() -> None:
    model = build("llama")

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model.__class__ = Doubled
    assert not is_plain(model)

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = self.predictions(output.logits)
            return output

    model.__class__, model.predictions = Other, torch.nn.Linear(128, 128)
    assert not is_plain(model)
    model.__class__ = type("Broken", (Doubled,), {"forward": len})
    assert not is_plain(model)
    assert "forward" not in vars(model.get_decoder()), "what the trial replaces is put back"


def test_a_head_with_rows_beyond_the_vocabulary_is_not_plain() -> None:
    model = build("llama")
    assert is_plain(model)
    model.config.vocab_size -= 1
    assert not is_plain(model)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_plan_knows_a_scale_of_logits(scale: float) -> None:
    model = build("granite", logits_scaling=scale)
    assert read_shape(model.config.to_dict(), "granite").whole_logits == (not is_plain(model)) == (scale != 1.0)


def test_gradients_of_a_head_in_fp16_are_summed_beyond_its_range() -> None:
    ones = torch.full((4, 4096), 40.0, dtype=torch.float16)
    found = _add_product(None, ones, ones.T.contiguous())
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((4, 4), 4096 * 1600.0))
