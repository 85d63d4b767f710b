"""The embedded engine's sampling parameters, biases, penalties, grammars and visible special tokens, against a reference."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
import torch

from ftray.engine.batch import complete
from ftray.engine.protocol import ParameterError, SamplingParams, SchemaError
from ftray.engine.transformers.engine import TransformersEngine
from ftray.engine.transformers.sampling import penalize, sample_token
from ftray.errors import DataError
from tests.unit.test_engine import by_generate, byte_tokenizer, make_prompts, tiny_model, with_engine

NUM = 24


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return tiny_model()


def shares(logits: torch.Tensor, params: SamplingParams, draws: int = 4000) -> dict[int, float]:
    counts = Counter(int(sample_token(logits, params, position)) for position in range(draws))
    return {token: count / draws for token, count in counts.items()}


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 0.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of 4/7, 2/7 and 1/7 two reach 0.8
        ({"min_p": 0.15, "top_k": 2}, {0, 1}),
    ],
)
def test_sampling_keeps_the_likeliest_tokens_in_their_proportions(change: dict[str, Any], kept: set[int]) -> None:
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0])
    drawn = shares(weights.log(), SamplingParams(1, temperature=1.0, seed=3, **change))
    total = sum(float(weights[i]) for i in kept)
    assert set(drawn) == kept
    assert all(abs(drawn[i] - float(weights[i]) / total) < 0.03 for i in kept)


def test_penalties_and_biases_follow_vllms_formulas() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 3.0])
    params = SamplingParams(
        9, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias=((3, 1.5), (4, -100.0))
    )
    penalize(logits, params, [0, 1, 2, 2, 2], num_prompt_tokens=2)
    # repetition: prompt and answer; presence and frequency: the answer alone
    assert logits.tolist() == [1.0, -4.0, 0.5 - 0.5 - 3 * 0.25, 2.0, -97.0]


def by_hand(model: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy tokens with penalties, one forward a token."""
    ids = list(prompt)
    for _ in range(NUM):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].float()
        penalize(logits, params, ids, len(prompt))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_requests_with_penalties_share_a_batch_and_leave_others_alone(model: Any) -> None:
    prompts = make_prompts(4)
    changes: list[dict[str, Any]] = [
        {"presence_penalty": 40.0, "frequency_penalty": 1.0},
        {"repetition_penalty": 1.8, "num_logprobs": 1},
        {"logit_bias": ((65, 100.0),)},
        {},
    ]
    asked = [SamplingParams(NUM, **change) for change in changes]

    async def body(engine: TransformersEngine) -> Any:
        return await asyncio.gather(*[complete(engine, str(i), prompts[i], asked[i]) for i in range(4)])

    answers = with_engine(model, byte_tokenizer(), body)
    assert [answer.token_ids for answer in answers[:2]] == [by_hand(model, prompts[i], asked[i]) for i in range(2)]
    assert len(set(by_generate(model, prompts[0], NUM))) < NUM == len(set(answers[0].token_ids))
    assert answers[2].text == "A" * NUM or answers[2].token_ids == [65] * NUM
    assert answers[3].token_ids == by_generate(model, prompts[3], NUM)


def test_a_grammar_is_followed_and_one_that_is_none_is_refused(model: Any) -> None:
    tokenizer = byte_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    grammar = f'%llguidance {{}}\nstart: <[{start}]> "call:" %json {json.dumps(schema)}\n'
    params = SamplingParams(80, temperature=1.0, seed=1, grammar=grammar, visible_ids=frozenset([start]))

    async def body(engine: TransformersEngine) -> Any:
        engine.check_grammar(grammar)
        for wrong in ("start: [", "start: missing", "%llguidance {}\n"):
            with pytest.raises(SchemaError, match="grammar of the answer"):
                engine.check_grammar(wrong)
        with pytest.raises(ParameterError) as caught:
            engine.generate("x", [1], SamplingParams(9, logit_bias=((300, 1.0),)))
        assert caught.value.name == "logit_bias"
        return [
            await complete(engine, "a", make_prompts(1)[0], params),
            await complete(
                engine, "b", make_prompts(1)[0], SamplingParams(80, temperature=1.0, seed=1, grammar=grammar)
            ),
        ]

    shown, hidden = with_engine(model, tokenizer, body)
    assert shown.text.startswith("<|im_start|>call:")
    assert shown.text == "<|im_start|>" + hidden.text
    assert set(json.loads(hidden.text.removeprefix("call:"))) >= {"n"}
    assert shown.finish_reason == "stop"


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": -1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"logit_bias": ((1, float("inf")),)},
        {"json_schema": "{}", "grammar": "start: "},
    ],
)
def test_parameters_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        SamplingParams(1, **change)
