"""From an engine's chunks of text to the pieces of an answer: reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from ftray.chat.parsers.answer import AnswerParser, Delta
from ftray.engine.protocol import OutputStream, TokenLogprob

AnswerEnd = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class AnswerChunk:
    """The next pieces of an answer. Other attributes: as in OutputChunk."""

    deltas: Sequence[Delta]
    finish_reason: AnswerEnd | None
    num_generated_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


async def read_text(stream: OutputStream, before: str = "") -> AsyncGenerator[AnswerChunk, None]:
    """The chunks of an answer that is text. before: text that comes first."""
    async with aclosing(stream):
        async for chunk in stream:
            deltas = [Delta("content", text)] if (text := before + chunk.text) else []
            before = ""
            yield AnswerChunk(deltas, chunk.finish_reason, chunk.num_generated_tokens, chunk.logprobs)


async def read_answer(
    stream: OutputStream, parser: AnswerParser, max_calls: int | None, *, is_named: bool
) -> AsyncGenerator[AnswerChunk, None]:
    """The chunks of an answer that may reason and call tools.

    Args:
        stream: The engine's.
        parser: Of this answer.
        max_calls: The answer ends before another call begins.
        is_named: The request named the function; such answers end with `stop`, as OpenAI's do.
    """
    async with aclosing(stream):
        async for chunk in stream:
            deltas = parser.push(chunk.text) if chunk.text else []
            end: AnswerEnd | None = chunk.finish_reason
            if end is not None:
                deltas += parser.finish()
            if is_over := max_calls is not None and parser.num_calls > max_calls:
                deltas, end = [delta for delta in deltas if not _is_beyond(delta, max_calls or 0)], "stop"
            if end == "stop" and parser.num_calls and not is_named:
                end = "tool_calls"
            yield AnswerChunk(merged(deltas), end, chunk.num_generated_tokens, chunk.logprobs)
            if is_over:
                return


def _is_beyond(delta: Delta, max_calls: int) -> bool:
    return delta.kind in ("call", "arguments") and delta.call >= max_calls


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Joins neighbours of the same kind and call."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if last and delta.kind != "call" and (last.kind, last.call) == (delta.kind, delta.call):
            joined[-1] = Delta(last.kind, last.text + delta.text, last.call)
        else:
            joined.append(delta)
    return joined
