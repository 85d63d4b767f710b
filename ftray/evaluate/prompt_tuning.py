"""Answers of a prompt-tuned model, one after the other: the engine's batches know no embeddings in front of a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ftray.engine.protocol import Completion, SamplingParams
from ftray.engine.transformers.engine import find_stop_tokens


@torch.no_grad()
def generate_virtual(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    on_done: Callable[[int], None] | None = None,
) -> list[Completion]:
    """As `engine.offline.generate_all`, greedily. model: a PeftModel of prompt tuning, in eval mode."""
    causal = model.get_base_model()
    virtual = model.get_prompt(batch_size=1)
    stops = find_stop_tokens(causal, tokenizer)
    found = []
    for prompt in prompts:
        began_s = time.monotonic()
        tokens = causal.get_input_embeddings()(torch.tensor([prompt], device=virtual.device))
        embeds = torch.cat([virtual.to(tokens.dtype), tokens], dim=1)
        with _own_settings_aside(causal):
            ids = causal.generate(  # given embeddings, it returns the new tokens only
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                max_new_tokens=params.max_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(stops) or None,
                pad_token_id=tokenizer.pad_token_id,
            )[0].tolist()
        stopped = bool(ids) and ids[-1] in stops
        shown = ids[:-1] if stopped else ids
        text = str(tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        found.append(Completion(text, ids, "stop" if stopped else "length", time.monotonic() - began_s))
        if on_done:
            on_done(len(found))
    return found


@contextmanager
def _own_settings_aside(causal: Any) -> Iterator[None]:
    """The engine, by which the base answers, knows nothing of penalties that a model's generation_config may hold."""
    from transformers import GenerationConfig

    kept, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = kept
