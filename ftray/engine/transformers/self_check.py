"""Checks at every start that a model answers the same in a batch with a paged cache as alone.

transformers' continuous batching accepts any causal model, including ones whose attention ignores its cache or masks. They
answer
wrongly, and some mix in the tokens of other requests, without an error.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import torch

from ftray.compat.transformers import attention_of
from ftray.engine.protocol import Engine, SamplingParams, TokenLogprob
from ftray.engine.transformers.softcap import caps_scores
from ftray.errors import ModelError

PROMPT, COMPANY, NUM_TOKENS, NUM_TOP = 24, 17, 3, 5
LEAST = 2 * NUM_TOKENS  # the smallest context for the check
MOST, HALF_MOST = 0.02, 0.5  # largest difference of log probabilities, in fp32 and in lower precision


@dataclass(frozen=True)
class ReferenceAnswer:
    """A prompt, and the model's own greedy answer to it. logprobs: float32 [NUM_TOKENS, vocabulary]."""

    prompt: list[int]
    token_ids: list[int]
    logprobs: torch.Tensor


def answer_alone(model: Any, max_context: int) -> ReferenceAnswer:
    """The answer without a cache or other requests. max_context: tokens of the prompt and its answer."""
    length = min(PROMPT, max_context - NUM_TOKENS)
    if not caps_scores(model.config):
        return _answer(model, length)
    usual = attention_of(model.config)
    model.set_attn_implementation("eager")  # sdpa ignores the cap
    try:
        return _answer(model, length)
    finally:
        model.set_attn_implementation(usual)


@torch.no_grad()
def _answer(model: Any, length: int) -> ReferenceAnswer:
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt, logprobs = list(ids), []
    for _ in range(NUM_TOKENS):
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
        logprobs.append(torch.log_softmax(logits.float(), dim=-1).cpu())
        ids.append(int(logprobs[-1].argmax()))
    return ReferenceAnswer(prompt, ids[length:], torch.stack(logprobs))


async def check_answers(engine: Engine, alone: ReferenceAnswer, model: Any) -> None:
    """Raises ModelError if the engine's answer differs while another request is running."""
    params = SamplingParams(NUM_TOKENS, num_logprobs=NUM_TOP)
    company = alone.prompt[:COMPANY][::-1]
    tokens, _ = await asyncio.gather(
        _ask(engine, "trial", alone.prompt, params), _ask(engine, "company", company, params)
    )
    worst = 0.0
    for place, token in enumerate(tokens):
        for token_id, logprob in ((token.token_id, token.logprob), *token.top):
            worst = max(worst, abs(logprob - float(alone.logprobs[place, token_id])))
        if token.token_id != alone.token_ids[place]:
            break  # the rest continues another text
    if worst > (MOST if model.dtype == torch.float32 else HALF_MOST):
        raise ModelError(
            f"models of type {model.config.model_type} can't be answered for many at a time: beside another request a token's "
            f"log probability is {worst:.2g} off; serve it by vLLM (serve.engine=vllm), or use another base"
        )


async def _ask(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> list[TokenLogprob]:
    logprobs: list[TokenLogprob] = []
    async for chunk in engine.generate(name, prompt, params):
        logprobs += chunk.logprobs
    return logprobs
