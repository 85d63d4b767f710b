"""The answers to one request, from the engine's chunks to bytes: whole or streamed, one or several at the same time.

Knows chunks and OpenAI's bodies, but not model names, keys or routes. `RequestStats` records how every answer ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ftray.engine.protocol import EngineError, FinishReason, OutputChunk, StuckError, TokenLogprob
from ftray.serve.asgi import EVENT_STREAM, Send, refuse, respond, unavailable
from ftray.serve.openai import RequestError, encode_json
from ftray.serve.openai_responses import DONE, ResponseFrame, Usage, encode_event, usage_of


@dataclass
class RequestStats:
    """The course of one request.

    Attributes:
        began_s: Monotonic start time.
        first_s: Seconds to the first text.
        status: The HTTP status, or 499 if the client left before the end.
        num_tokens: Generated tokens, by the answer's index.
        is_late: Whether max_answer_s ended the answer.
        scripts: Letters of the prompt by script.
    """

    began_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    status: int = 499
    num_prompt_tokens: int = 0
    num_tokens: dict[int, int] = field(default_factory=dict)  # by the answer's index
    has_text: bool = False
    is_late: bool = False  # max_answer_s ended the answer
    scripts: Mapping[str, int] = field(default_factory=dict)

    def note(self, index: int, chunk: OutputChunk) -> bool:
        """Records a chunk. Returns whether it has the request's first text."""
        self.num_prompt_tokens = chunk.num_prompt_tokens
        self.num_tokens[index] = chunk.num_generated_tokens
        if not chunk.text or self.has_text:
            return False
        self.has_text, self.first_s = True, time.monotonic() - self.began_s
        return True

    @property
    def usage(self) -> Usage:
        return usage_of(self.num_prompt_tokens, sum(self.num_tokens.values()))


@dataclass
class _ChoiceStream:
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class AnswerStream:
    """The answers to one request.

    Attributes:
        streams: One iterator of chunks per answer.
        end_ids: Tokens that end an answer and are not text.
        on_first: Called when the first text of any answer arrives.
        on_end: Called when all answers have ended.
    """

    streams: Sequence[AsyncIterator[OutputChunk]]
    frame: ResponseFrame
    stats: RequestStats
    max_answer_s: float
    has_logprobs: bool
    end_ids: frozenset[int]
    on_first: Callable[[RequestStats], None]
    on_end: Callable[[RequestStats], None]

    async def whole(self, send: Send) -> None:
        """Sends one JSON body."""
        choices = [_ChoiceStream() for _ in self.streams]
        try:
            async with asyncio.timeout(self.max_answer_s), aclosing(_merged(self.streams)) as merged:
                async for index, chunk in merged:
                    self._note(index, chunk)
                    choices[index].texts.append(chunk.text)
                    choices[index].logprobs += self._logprobs(chunk) or ()
                    choices[index].finish_reason = chunk.finish_reason
            body = self.frame.whole([self._choice(i, c) for i, c in enumerate(choices)], self.stats.usage)
            self.stats.status = 200
            await respond(send, 200, encode_json(body))
        except StuckError as err:
            self.stats.status = 400
            await refuse(send, RequestError(400, str(err), param="response_format"))
        except (EngineError, TimeoutError) as err:
            self.stats.status, self.stats.is_late = 503, isinstance(err, TimeoutError)
            await refuse(send, unavailable(err))
        except Exception:
            self.stats.status = 500
            raise
        finally:
            self.on_end(self.stats)

    async def stream(self, include_usage: bool, send: Send) -> None:
        """Sends server-sent events: text as soon as it is final."""

        async def event(value: Any) -> None:
            await send({"type": "http.response.body", "body": encode_event(value), "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            async with asyncio.timeout(self.max_answer_s), aclosing(_merged(self.streams)) as merged:
                for index in range(len(self.streams)):
                    if first := self.frame.first(index):
                        await event(first)
                async for index, chunk in merged:
                    self._note(index, chunk)
                    logprobs = self._logprobs(chunk)
                    if chunk.text or chunk.finish_reason or logprobs:
                        await event(self.frame.delta(chunk.text, chunk.finish_reason, index, logprobs))
            if include_usage:
                await event(self.frame.usage(self.stats.usage))
            last, self.stats.status = DONE, 200
        except StuckError as err:
            last, self.stats.status = encode_event(RequestError(400, str(err), param="response_format").body()), 400
        except (EngineError, TimeoutError) as err:
            # The status has been sent: clients recognize an error in the stream by its shape and the missing [DONE].
            last, self.stats.status = encode_event(unavailable(err).body()), 503
            self.stats.is_late = isinstance(err, TimeoutError)
        except Exception:
            self.stats.status = 500
            raise
        finally:
            self.on_end(self.stats)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _note(self, index: int, chunk: OutputChunk) -> None:
        if self.stats.note(index, chunk):
            self.on_first(self.stats)

    def _choice(self, index: int, choice: _ChoiceStream) -> dict[str, Any]:
        assert choice.finish_reason is not None
        logprobs = choice.logprobs if self.has_logprobs else None
        return self.frame.choice(index, "".join(choice.texts), choice.finish_reason, logprobs)

    def _logprobs(self, chunk: OutputChunk) -> list[TokenLogprob] | None:
        return [one for one in chunk.logprobs if one.token_id not in self.end_ids] if self.has_logprobs else None


async def _merged(streams: Sequence[AsyncIterator[OutputChunk]]) -> AsyncGenerator[tuple[int, OutputChunk], None]:
    """Chunks of all streams as they arrive, each with its stream's number. The first error ends all streams."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:  # type: ignore[type-var]
            async for chunk in only:
                yield 0, chunk
        return
    inbox: asyncio.Queue[tuple[int, OutputChunk | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[OutputChunk]) -> None:
        end: Exception | None = None
        try:
            async with aclosing(stream):  # type: ignore[type-var]
                async for chunk in stream:
                    inbox.put_nowait((index, chunk))
        except Exception as err:  # noqa: BLE001 - raised below, by whoever reads
            end = err
        inbox.put_nowait((index, end))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(pumps)
        while left:
            index, item = await inbox.get()
            if isinstance(item, OutputChunk):
                yield index, item
            elif item is None:
                left -= 1
            else:
                raise item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
