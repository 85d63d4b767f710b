"""The answers to one request, from their chunks to bytes: whole or streamed, one or several at the same time.

Knows chunks and OpenAI's bodies, but not model names, keys or routes. `RequestStats` records how every answer ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ftray.engine.protocol import EngineError, StuckError, TokenLogprob
from ftray.serve.answers import AnswerChunk
from ftray.serve.asgi import EVENT_STREAM, Send, refuse, respond, unavailable
from ftray.serve.openai import RequestError, encode_json
from ftray.serve.openai_answers import AnswerFrame, Usage, WholeAnswer, encode_event, usage_of


@dataclass
class RequestStats:
    """The course of one request.

    Attributes:
        began_s: Monotonic start time.
        first_s: Seconds to the first text.
        status: The HTTP status, or 499 if the client left before the end.
        num_prompt_tokens: Tokens of all prompts.
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

    def note(self, index: int, chunk: AnswerChunk) -> bool:
        """Records a chunk. Returns whether it has the request's first text."""
        self.num_tokens[index] = chunk.num_generated_tokens
        if not chunk.deltas or self.has_text:
            return False
        self.has_text, self.first_s = True, time.monotonic() - self.began_s
        return True

    @property
    def usage(self) -> Usage:
        return usage_of(self.num_prompt_tokens, sum(self.num_tokens.values()))


@dataclass(frozen=True)
class AnswerStream:
    """The answers to one request.

    Attributes:
        streams: One iterator of chunks per answer.
        constraint: The request's field that the answers must follow, for the error of an answer that cannot.
        end_ids: Tokens that end an answer and are not text.
        on_first: Called when the first text of any answer arrives.
        on_end: Called when all answers have ended.
    """

    streams: Sequence[AsyncGenerator[AnswerChunk, None]]
    frame: AnswerFrame
    stats: RequestStats
    max_answer_s: float
    has_logprobs: bool
    constraint: str
    end_ids: frozenset[int]
    on_first: Callable[[RequestStats], None]
    on_end: Callable[[RequestStats], None]

    async def whole(self, send: Send) -> None:
        """Sends one JSON body."""
        answers = [WholeAnswer(logprobs=[] if self.has_logprobs else None) for _ in self.streams]
        try:
            async with asyncio.timeout(self.max_answer_s), aclosing(_merged(self.streams)) as merged:
                async for index, chunk in merged:
                    self._note(index, chunk)
                    answer = answers[index]
                    answer.parts.add(chunk.deltas)
                    answer.finish_reason = chunk.finish_reason
                    if answer.logprobs is not None:
                        answer.logprobs += self._logprobs(chunk) or ()
            body = self.frame.whole(answers, self.stats.usage)
            self.stats.status = 200
            await respond(send, 200, encode_json(body))
        except StuckError as err:
            self.stats.status = 400
            await refuse(send, RequestError(400, str(err), param=self.constraint))
        except (EngineError, TimeoutError) as err:
            self.stats.status, self.stats.is_late = 503, isinstance(err, TimeoutError)
            await refuse(send, unavailable(err))
        except Exception:
            self.stats.status = 500
            raise
        finally:
            self.on_end(self.stats)

    async def stream(self, send: Send) -> None:
        """Sends server-sent events: text as soon as it is final."""

        async def send_all(events: Sequence[dict[str, Any]]) -> None:
            for event in events:
                await send({"type": "http.response.body", "body": self.frame.encode(event), "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            async with asyncio.timeout(self.max_answer_s), aclosing(_merged(self.streams)) as merged:
                await send_all(self.frame.begin(len(self.streams)))
                async for index, chunk in merged:
                    self._note(index, chunk)
                    await send_all(self.frame.chunk(index, chunk, self._logprobs(chunk)))
            await send_all(self.frame.end(self.stats.usage))
            last, self.stats.status = self.frame.done, 200
        except StuckError as err:
            last, self.stats.status = encode_event(RequestError(400, str(err), param=self.constraint).body()), 400
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

    def _note(self, index: int, chunk: AnswerChunk) -> None:
        if self.stats.note(index, chunk):
            self.on_first(self.stats)

    def _logprobs(self, chunk: AnswerChunk) -> list[TokenLogprob] | None:
        return [one for one in chunk.logprobs if one.token_id not in self.end_ids] if self.has_logprobs else None


async def _merged(
    streams: Sequence[AsyncGenerator[AnswerChunk, None]],
) -> AsyncGenerator[tuple[int, AnswerChunk], None]:
    """Chunks of all streams as they arrive, each with its stream's number. The first error ends all streams."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for chunk in only:
                yield 0, chunk
        return
    inbox: asyncio.Queue[tuple[int, AnswerChunk | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[AnswerChunk, None]) -> None:
        end: Exception | None = None
        try:
            async with aclosing(stream):
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
            if isinstance(item, AnswerChunk):
                yield index, item
            elif item is None:
                left -= 1
            else:
                raise item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
