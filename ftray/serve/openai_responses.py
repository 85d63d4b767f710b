"""OpenAI's answer bodies: responses, chunks of a stream, usage, log probabilities, lists of models.

Knows nothing of Ray, torch, transformers, web frameworks or engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from ftray.engine.protocol import FinishReason, TokenLogprob
from ftray.serve.auth import answer_id
from ftray.serve.openai import encode_json

DONE = b"data: [DONE]\n\n"


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage_of(num_prompt_tokens: int, num_generated_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_generated_tokens,
        total_tokens=num_prompt_tokens + num_generated_tokens,
    )


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ftray"
    lineage: str | None = None  # the id in the run.json of the run that it comes from


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


@dataclass(frozen=True)
class ResponseFrame:
    """The fields that all chunks of an answer, or its whole body, share. spell: token id → text, for log probabilities."""

    chat: bool
    model: str
    id: str
    created: int
    spell: Callable[[int], str]

    @classmethod
    def begin(cls, *, chat: bool, model: str, spell: Callable[[int], str], caller: str = "") -> ResponseFrame:
        return cls(chat, model, answer_id("chatcmpl" if chat else "cmpl", caller), int(time.time()), spell)

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """Body of a plain response. choices: as `choice` makes them."""
        return {**self._frame("chat.completion"), "choices": choices, "usage": usage.model_dump()}

    def choice(
        self, index: int, text: str, finish_reason: FinishReason, logprobs: Sequence[TokenLogprob] | None
    ) -> dict[str, Any]:
        """One answer of a plain response."""
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        )
        return {"index": index, "finish_reason": finish_reason, "logprobs": self._logprobs(logprobs), **content}

    def first(self, index: int = 0) -> dict[str, Any] | None:
        """The first chunk of a chat stream has the role; a completion has none."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None) if self.chat else None

    def delta(
        self,
        text: str,
        finish_reason: FinishReason | None,
        index: int = 0,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._chunk(index, content, finish_reason, logprobs)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last chunk under `include_usage`, without choices."""
        return {**self._frame("chat.completion.chunk"), "choices": [], "usage": usage.model_dump()}

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            **content,
            "finish_reason": finish_reason,
            "logprobs": self._logprobs(logprobs),
        }
        return {**self._frame("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        if self.chat:
            return {
                "content": [
                    {
                        **self._entry(one.token_id, one.logprob),
                        "top_logprobs": [self._entry(token, logprob) for token, logprob in one.top],
                    }
                    for one in tokens
                ],
                "refusal": None,
            }
        return {
            "tokens": [self.spell(one.token_id) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{self.spell(token): logprob for token, logprob in one.top} for one in tokens],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.spell(token)  # a token may be half a character; its bytes are then not known here
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _frame(self, chat_object: str) -> dict[str, Any]:
        kind = chat_object if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def encode_event(value: Any) -> bytes:
    """A server-sent event. JSON escapes line breaks, so it is one `data:` line."""
    return b"data: " + encode_json(value) + b"\n\n"
