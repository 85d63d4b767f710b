"""OpenAI's answer bodies: responses, chunks of a stream, usage, log probabilities, lists of models.

Knows nothing of Ray, torch, transformers, web frameworks or engines.
"""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel

from ftray.chat.parsers.answer import AnswerParts, Delta
from ftray.engine.protocol import TokenLogprob
from ftray.serve.answers import AnswerChunk, AnswerEnd
from ftray.serve.openai import encode_json

_LETTERS = string.ascii_letters + string.digits
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


@dataclass
class WholeAnswer:
    """One answer of a response that is not streamed."""

    parts: AnswerParts = field(default_factory=AnswerParts)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: AnswerEnd | None = None


class AnswerFrame(Protocol):
    """Makes the bodies of one response. Events are objects that `encode` writes as server-sent events."""

    @property
    def done(self) -> bytes:
        """What ends a stream."""

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> dict[str, Any]:
        """The body of a response that is not streamed."""

    def begin(self, num_answers: int) -> list[dict[str, Any]]:
        """The first events of a stream."""

    def chunk(self, index: int, chunk: AnswerChunk, logprobs: Sequence[TokenLogprob] | None) -> list[dict[str, Any]]:
        """The events of a chunk of the answer with this index."""

    def end(self, usage: Usage) -> list[dict[str, Any]]:
        """The last events of a stream."""

    def encode(self, event: dict[str, Any]) -> bytes: ...


@dataclass(frozen=True)
class _OpenAIFrame:
    """What chats and completions share.

    Attributes:
        spell: Token id → its bytes, for log probabilities.
        include_usage: Whether a stream ends with the usage.
    """

    model: str
    id: str
    spell: Callable[[int], bytes]
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    done: bytes = DONE

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def begin(self, num_answers: int) -> list[dict[str, Any]]:  # noqa: ARG002
        return []

    def end(self, usage: Usage) -> list[dict[str, Any]]:
        """The usage, under `include_usage`, without choices."""
        return (
            [{**self._head(self.chunk_kind), "choices": [], "usage": usage.model_dump()}] if self.include_usage else []
        )

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "finish_reason": answer.finish_reason,
                "logprobs": self._logprobs(answer.logprobs),
                **self._content(answer.parts),
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": usage.model_dump()}

    def encode(self, event: dict[str, Any]) -> bytes:
        return encode_event(event)

    def _content(self, parts: AnswerParts) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        raise NotImplementedError

    def _text(self, token: int) -> str:
        return self.spell(token).decode(errors="replace")

    def _event(
        self, index: int, content: dict[str, Any], end: AnswerEnd | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "finish_reason": end, "logprobs": logprobs}
        return {**self._head(self.chunk_kind), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class CompletionFrame(_OpenAIFrame):
    """Bodies of /v1/completions."""

    kind = chunk_kind = "text_completion"

    def chunk(self, index: int, chunk: AnswerChunk, logprobs: Sequence[TokenLogprob] | None) -> list[dict[str, Any]]:
        text = "".join(delta.text for delta in chunk.deltas)
        if not (text or chunk.finish_reason or logprobs):
            return []
        return [self._event(index, {"text": text}, chunk.finish_reason, self._logprobs(logprobs))]

    def _content(self, parts: AnswerParts) -> dict[str, Any]:
        return {"text": parts.content}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            "tokens": [self._text(one.token_id) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{self._text(token): logprob for token, logprob in one.top} for one in tokens],
        }


@dataclass(frozen=True)
class ChatFrame(_OpenAIFrame):
    """Bodies of /v1/chat/completions. Calls have ids that all chat templates accept: nine letters and digits."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def begin(self, num_answers: int) -> list[dict[str, Any]]:
        first = {"delta": {"role": "assistant", "content": ""}}
        return [self._event(index, first, None) for index in range(num_answers)]

    def chunk(self, index: int, chunk: AnswerChunk, logprobs: Sequence[TokenLogprob] | None) -> list[dict[str, Any]]:
        """One event per piece. The first has the log probabilities, the last the finish reason."""
        pieces: list[dict[str, Any]] = [_delta(delta) for delta in chunk.deltas]
        if not pieces and (chunk.finish_reason or logprobs):
            pieces = [{}]
        last = len(pieces) - 1
        return [
            self._event(
                index,
                {"delta": piece},
                chunk.finish_reason if i == last else None,
                self._logprobs(logprobs) if i == 0 else None,
            )
            for i, piece in enumerate(pieces)
        ]

    def _content(self, parts: AnswerParts) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        if parts.calls:
            message["content"] = parts.content or None
            message["tool_calls"] = [
                {"id": call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in parts.calls
            ]
        return {"message": message}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        content = [
            {
                **self._entry(one.token_id, one.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in one.top],
            }
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token may be a part of a character: its bytes say which."""
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self.spell(token))}


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    call: dict[str, Any] = {"index": delta.call}
    if delta.kind == "call":
        call |= {"id": call_id(), "type": "function", "function": {"name": delta.text, "arguments": ""}}
    else:
        call["function"] = {"arguments": delta.text}
    return {"tool_calls": [call]}


def call_id() -> str:
    """A new id of a tool call."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def encode_event(value: Any) -> bytes:
    """A server-sent event. JSON escapes line breaks, so it is one `data:` line."""
    return b"data: " + encode_json(value) + b"\n\n"
