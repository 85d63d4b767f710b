"""An engine tries an answer when it starts: families that it can't answer for in batches are refused there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from ftray.engine.protocol import EngineError
from ftray.engine.transformers.engine import TransformersEngine
from ftray.errors import ModelError
from tests.unit.test_engine import byte_tokenizer
from tests.unit.test_output_head import build


def start(model: Any, max_context: int = 64) -> None:
    async def work() -> None:
        engine = TransformersEngine(model, byte_tokenizer(), max_num_seqs=2, max_context=max_context, stop_token_ids=())
        await engine.start()
        await engine.stop()

    asyncio.run(work())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "olmo2")),
        *((kind, {"num_key_value_heads": 4}) for kind in ("gpt2", "gpt_neox")),
        ("gemma3_text", {"sliding_window": 8}),
        ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 1}),
    ],
)
def test_families_that_answer_in_batches_as_alone_start(kind: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(kind, **{"vocab_size": 260, **more}).to(dtype)
    before = model.config._attn_implementation
    start(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("kind", ["bloom", "mpt", "xglm", "gpt_neox_japanese", "diffllama", "recurrent_gemma"])
def test_families_that_do_not_are_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"models of type {kind} can't be answered for many at a time"):
        start(build(kind, vocab_size=260))


@pytest.mark.parametrize("max_context", [1, 5, 6, 20])
def test_the_trial_keeps_to_the_context(max_context: int) -> None:
    start(build("llama", vocab_size=260), max_context)


def test_layers_that_batches_do_not_know_are_told_in_one_sentence() -> None:
    model = build("jamba", vocab_size=260)
    before = model.config._attn_implementation
    with pytest.raises(EngineError, match="the engine could not start: "):
        start(model)
    assert model.config._attn_implementation == before
