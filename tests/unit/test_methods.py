"""What is trained: freezing, virtual tokens in packed rows, rsLoRA and DoRA as PEFT knows them, smoothed labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftray import config
from ftray.data.packing import pack_examples
from ftray.engine.protocol import SamplingParams
from ftray.errors import ConfigError
from ftray.evaluate.score import generate_prompt_tuned
from ftray.model.export import write_adapter, write_whole
from ftray.model.lora import (
    add_adapters,
    add_prompt,
    build_model,
    check_targets,
    dtype_of,
    frozen_names,
    trainable,
)
from ftray.train.batch import collate
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.prompt_tuning import PromptTuning
from ftray.train.objectives.sft import LinearCrossEntropy, Sft
from tests import tiny

NAMES = [name for name, _ in tiny.make_model().named_parameters()]
LENGTHS = [17, 1, 40, 3, 29]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> config.ModelConfig:
    return config.ModelConfig(base=str(tiny.write_tiny_model(tmp_path_factory.mktemp("base"))))


def method(**keys: Any) -> config.MethodConfig:
    return config.MethodConfig(**{"type": "lora", "rank": 4, "alpha": 8, **keys})


def documents(seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, tiny.VOCAB_SIZE, n).tolist(), (rng.random(n) < 0.7).tolist()) for n in LENGTHS]


def batch_of(docs: list[tuple[list[int], list[bool]]], packing: bool = True) -> Any:
    rows = pack_examples(docs, 64, 1, packing)

    def matrix(name: str) -> Any:
        return np.stack([getattr(row, name) for row in rows])

    lengths = np.array([row.num_tokens for row in rows], dtype=np.int32)
    return collate(matrix("input_ids"), matrix("labels"), matrix("position_ids"), lengths)


def loss_of(model: ObjectiveModel, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch)[0]
    return loss


# Freezing


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["embed_tokens"], ["model.embed_tokens.weight"]),
        (["model.layers.0"], [name for name in NAMES if name.startswith("model.layers.0.")]),
        (["layers.*.mlp"], [name for name in NAMES if ".mlp." in name]),
        (["q_proj", "lm_head"], [name for name in NAMES if ".q_proj." in name or name.startswith("lm_head")]),
        (["*norm"], [name for name in NAMES if "norm." in name]),
        (["model.norm.weight"], ["model.norm.weight"]),
        ([], []),
    ],
)
def test_a_pattern_freezes_the_parameters_whose_names_hold_it(patterns: list[str], expected: list[str]) -> None:
    assert frozen_names(NAMES, patterns) == expected


def test_layer_one_is_not_layer_eleven() -> None:
    names = [f"layers.{n}.weight" for n in range(12)]
    assert frozen_names(names, ["layers.1"]) == ["layers.1.weight"]


def test_what_fits_nothing_and_what_leaves_nothing_is_refused(base: config.ModelConfig) -> None:
    for wrong in ("embed_token", "layers.7", "norm.bias", "."):
        with pytest.raises(ConfigError, match=r"method.freeze: .* matches no parameter; similar names are "):
            check_targets(base, method(type="full", freeze=[wrong]))
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        build_model(base, method(type="full", freeze=["model", "lm_head"]), "fp32", 0)


def test_what_is_frozen_has_no_gradient_and_all_else_has(base: config.ModelConfig) -> None:
    model = build_model(base, method(type="full", freeze=["embed_tokens", "layers.0"]), "fp32", 0)
    loss_of(ObjectiveModel(model, Sft()), batch_of(documents())).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(trainable(model)) == {n for n in NAMES if "embed_tokens" not in n and "layers.0." not in n}


# Virtual tokens


@pytest.fixture(scope="module")
def prompted() -> Any:
    model = add_prompt(tiny.make_model(seed=3), method(type="prompt-tuning", num_virtual_tokens=5), seed=1)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(3)  # far enough from the vocabulary's to be told apart
    return model.eval()


def loss_by_peft(model: Any, document: tuple[list[int], list[bool]]) -> torch.Tensor:
    """One document through PEFT's own forward."""
    ids, mask = document
    labels = torch.tensor([[i if m and t else -100 for t, (i, m) in enumerate(zip(ids, mask, strict=True))]])
    logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, 5:]
    return torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("packing", [True, False])
def test_each_packed_document_sees_the_virtual_tokens_as_if_it_were_alone(prompted: Any, packing: bool) -> None:
    docs = [d for d in documents() if any(d[1][1:])]
    with torch.no_grad():
        packed = float(loss_of(ObjectiveModel(prompted, PromptTuning()), batch_of(docs, packing)))
        alone = sum(float(loss_by_peft(prompted, d)) for d in docs)
        bare = float(loss_of(ObjectiveModel(prompted.get_base_model(), Sft()), batch_of(docs, packing)))
    assert packed == pytest.approx(alone, rel=1e-5)
    assert abs(packed - bare) > 1e-3 * bare


def test_the_virtual_tokens_gradient_is_the_sum_over_documents(prompted: Any) -> None:
    docs = [d for d in documents(1) if any(d[1][1:])]
    weight = prompted.prompt_encoder["default"].embedding.weight
    found = []
    for losses in (
        [loss_of(ObjectiveModel(prompted, PromptTuning()), batch_of(docs))],
        [loss_by_peft(prompted, d) for d in docs],
    ):
        weight.grad = None
        for loss in losses:
            loss.backward()
        found.append(weight.grad.clone())
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()
    assert list(trainable(prompted)) == ["prompt_encoder.default.embedding.weight"]


def test_exported_virtual_tokens_are_an_adapter_that_peft_loads(
    prompted: Any, base: config.ModelConfig, tmp_path: Path
) -> None:
    from peft import PeftModel

    with torch.no_grad():
        expected = [float(loss_by_peft(prompted, d)) for d in documents()[:1]]
        write_adapter(prompted, base, "fp32", tmp_path)
        loaded = PeftModel.from_pretrained(tiny.make_model(seed=3), tmp_path).eval()
        assert [float(loss_by_peft(loaded, d)) for d in documents()[:1]] == expected


def test_answers_are_those_of_greedy_decoding_behind_the_virtual_tokens(prompted: Any) -> None:
    tokenizer = tiny.make_tokenizer()
    done: list[int] = []
    prompts = [tokenizer(text)["input_ids"] for text in ("Ada meets a cow.", "hello")]
    settings = prompted.get_base_model().generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 9.0, 1  # the base answers without them, by the engine
    answers = generate_prompt_tuned(prompted, tokenizer, prompts, SamplingParams(max_tokens=8), on_done=done.append)
    assert prompted.get_base_model().generation_config is settings
    assert done == [1, 2]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer.token_ids:
            with torch.no_grad():
                whole = prompted(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
            assert int(whole.logits[0, -1].argmax()) == token
            ids.append(token)
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == tokenizer.eos_token_id else "length")
        assert len(answer.token_ids) == 8 or answer.finish_reason == "stop"


# Whole weights


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_transformers_keeps_in_fp32_is_not_rounded(
    base: config.ModelConfig, tmp_path: Path, precision: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **shape, **small, **heads))
    exact = torch.tensor([5.0045, 5.01, 5.0065, 5.0026])
    model.model.layers[0].mlp.gate.e_score_correction_bias.copy_(exact)
    write_whole(model, base, precision, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype_of(precision))
    assert torch.equal(loaded.model.layers[0].mlp.gate.e_score_correction_bias, exact)
    assert loaded.lm_head.weight.dtype == dtype_of(precision)


# rsLoRA and DoRA


def test_rslora_scales_by_the_root_of_the_rank_and_dora_adds_a_magnitude() -> None:
    plain = add_adapters(tiny.make_model(), method(), seed=0)
    both = add_adapters(tiny.make_model(), method(rslora=True, dora=True), seed=0)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert plain.get_submodule(layer).scaling["default"] == 8 / 4
    assert both.get_submodule(layer).scaling["default"] == 8 / math.sqrt(4)
    more = trainable(both).keys() - trainable(plain).keys()
    assert len(more) == len(trainable(plain)) // 2
    assert all("magnitude" in name for name in more)


# Smoothed labels


@pytest.mark.parametrize("num_tokens", [1, 7, 30])
def test_the_fused_smoothed_loss_is_the_plain_one_with_its_gradients(num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    hidden, weight, targets = torch.randn(num_tokens, 16), torch.randn(50, 16), torch.randint(50, (num_tokens,))

    def run(fused: bool) -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        plain = torch.nn.functional.cross_entropy
        loss = (
            LinearCrossEntropy.apply(h, w, targets, 0.2)
            if fused
            else plain(h @ w.T, targets, reduction="sum", label_smoothing=0.2)
        )
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        return [loss.detach(), h.grad, w.grad]

    for found, wanted in zip(run(fused=True), run(fused=False), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_labels_are_smoothed_in_training_and_not_in_the_eval_loss() -> None:
    model, batch = tiny.make_model(seed=3), batch_of(documents())
    smooth, plain = ObjectiveModel(model, Sft(0.2)).train(), ObjectiveModel(model, Sft()).train()
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
    where = (batch.labels[0] >= 0).nonzero()[:, 0]
    spread = -float(logits[where].log_softmax(-1).mean(-1).sum())
    with torch.no_grad():
        expected = 0.8 * float(loss_of(plain, batch)) + 0.2 * spread
        assert float(loss_of(smooth, batch)) == pytest.approx(expected, rel=1e-5)
        assert float(loss_of(smooth.eval(), batch)) == float(loss_of(plain.eval(), batch))
