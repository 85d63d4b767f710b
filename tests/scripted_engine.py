"""An engine for tests of the endpoint: a real tokenizer, detokenizer and schema compiler around answers that are given.

It answers each request with the next of its texts, or, for a constrained request, with the first of its texts that the
constraint allows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch

from ftray.engine.detokenizer import Detokenizer, read_tokens, text_decoder
from ftray.engine.protocol import OutputChunk, SamplingParams, check_request
from ftray.engine.structured_output import SchemaCompiler


class ScriptedEngine:
    """An `Engine`.

    Args:
        tokenizer: With a chat template.
        texts: Answers, with the special tokens inside them and without the end token.
        stop_token_ids: Of the chat template.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], stop_token_ids: tuple[int, ...]) -> None:
        self.tokenizer, self.texts, self.stop_token_ids = tokenizer, list(texts), stop_token_ids
        self.max_context = 100_000
        self._schemas = SchemaCompiler(tokenizer, len(tokenizer), stop_token_ids)
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.num_closed = 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def health(self) -> None: ...

    def check_schema(self, schema: str) -> None:
        self._schemas.guide(schema)

    def check_grammar(self, grammar: str) -> None:
        self._schemas.guide(grammar, is_grammar=True)

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> AsyncGenerator[OutputChunk, None]:
        check_request(prompt_ids, params, len(self.tokenizer), self.max_context)
        self.prompts.append(prompt_ids)
        self.params.append(params)
        return self._generate(len(prompt_ids), self._answer(params), params)

    def _answer(self, params: SamplingParams) -> list[int]:
        end = self.stop_token_ids[0]
        answers = [[*self.tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in self.texts]
        if self._schemas.guide_for(params) is not None:
            return next(ids for ids in answers if self._follows(ids, params))
        self.texts.append(self.texts.pop(0))
        return answers[0]

    def _follows(self, answer: list[int], params: SamplingParams) -> bool:
        guide = self._schemas.guide_for(params)
        assert guide is not None
        for i, token in enumerate(answer):
            logits = torch.zeros(len(self.tokenizer))
            guide.mask(logits, answer[:i])
            if guide.error or logits[token] < 0:
                return False
        return True

    async def _generate(
        self, num_prompt: int, ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[OutputChunk, None]:
        stream = Detokenizer(text_decoder(self.tokenizer, params.visible_ids), params.stop)
        ids = ids[: params.max_tokens]
        try:
            for i, token in enumerate(ids):
                await asyncio.sleep(0)
                text, _, reason = read_tokens(stream, [token], self.stop_token_ids, is_last=i + 1 == len(ids))
                yield OutputChunk(text, [token], reason, num_prompt, i + 1)
                if reason:
                    return
        finally:
            self.num_closed += 1
