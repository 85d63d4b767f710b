"""The HTTP side of one replica: OpenAI's routes around an engine, as an ASGI app.

Knows nothing of Ray, torch or transformers: any `Engine` will do, and tests may give one of their own. Logs no prompt
and no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ftray.chat import ChatFormat, read_messages
from ftray.engine.protocol import Chunk, Completion, ContextLengthError, Engine, EngineError, SamplingParams
from ftray.errors import DataError
from ftray.serve.keys import KeyGuard
from ftray.serve.protocol import (
    DONE,
    MAX_BODY_BYTES,
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    Reply,
    RequestError,
    encode_event,
    encode_json,
    parse_request,
    usage_of,
)

logger = logging.getLogger(__name__)
_RETRY_AFTER = [(b"retry-after", b"1")]


def build_api(
    engine: Engine,
    model_id: str,
    *,
    max_tokens: int,
    key_hashes: tuple[str, ...] = (),
    max_answer_s: float = 600.0,
) -> Any:
    """An ASGI app that owns the engine: its lifespan starts and stops it.

    max_tokens: most that a request may ask for, and the default. max_answer_s: an answer that takes longer is ended
    with an error, so that a draining replica knows how long to wait.
    """
    api = _Api(engine, model_id, max_tokens, max_answer_s)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{model_id:path}", api.model, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
        ],
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_error,
        },
        middleware=[Middleware(_Shield)],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect has no body in OpenAI's shape
    return KeyGuard(app, key_hashes)


class _Api:
    def __init__(self, engine: Engine, model_id: str, max_tokens: int, max_answer_s: float) -> None:
        self._engine = engine
        self._card = ModelCard(id=model_id, created=int(time.time()))
        self._max_tokens = max_tokens
        self._max_answer_s = max_answer_s
        has_template = getattr(engine.tokenizer, "chat_template", None)
        self._format = ChatFormat(engine.tokenizer) if has_template else None

    async def health(self, _: Request) -> Response:
        self._engine_or_503()
        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        return JSONResponse(ModelList(data=[self._card]).model_dump())

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model_id"])
        return JSONResponse(self._card.model_dump())

    async def chat(self, request: Request) -> Response:
        asked = parse_request(await _read_body(request), ChatRequest, max_tokens=self._max_tokens)
        self._check_model(asked.model)
        if self._format is None:
            message = f"the model {self._card.id} has no chat template; use /v1/completions"
            raise RequestError(400, message, param="model")
        try:
            messages = read_messages([message.turn() for message in asked.messages])
            # in a thread: a megabyte of text takes a second to tokenize, and streams must not wait for it
            prompt_ids = await asyncio.to_thread(self._format.encode_prompt, messages)
        except DataError as err:
            raise RequestError(400, str(err), param="messages") from None
        return self._answer(asked, prompt_ids, chat=True)

    async def completions(self, request: Request) -> Response:
        asked = parse_request(await _read_body(request), CompletionRequest, max_tokens=self._max_tokens)
        self._check_model(asked.model)
        prompt = asked.prompt_or_ids
        if isinstance(prompt, str):
            encoded = await asyncio.to_thread(self._engine.tokenizer, prompt, add_special_tokens=False)
            prompt = list(encoded["input_ids"])
        return self._answer(asked, prompt, chat=False)

    def _answer(self, asked: ChatRequest | CompletionRequest, prompt_ids: list[int], *, chat: bool) -> Response:
        request_id = uuid.uuid4().hex
        where = "messages" if chat else "prompt"
        left = self._engine.max_context - len(prompt_ids)
        # What the client left to us is cut to what fits; what it asked for is not.
        max_tokens = asked.num_tokens_asked or max(1, min(self._max_tokens, left))
        try:
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                stop=asked.stops,
                seed=asked.seed,
            )
            chunks = self._engine.generate(request_id, prompt_ids, params)
        except ContextLengthError as err:
            raise RequestError(400, str(err), param=where, code="context_length_exceeded") from None
        except DataError as err:
            raise RequestError(400, str(err), param=where) from None
        except EngineError as err:
            raise _unavailable(err) from err
        reply = Reply.begin(chat=chat, model=self._card.id)
        if asked.stream:
            return _Worked(lambda send: self._stream(chunks, reply, asked.include_usage, send))
        return _Worked(lambda send: self._whole(chunks, reply, send))

    async def _whole(self, chunks: AsyncIterator[Chunk], reply: Reply, send: _Send) -> None:
        texts: list[str] = []
        token_ids: list[int] = []
        try:
            async with asyncio.timeout(self._max_answer_s), aclosing(chunks):  # type: ignore[type-var]
                async for chunk in chunks:
                    texts.append(chunk.text)
                    token_ids += chunk.token_ids
        except (EngineError, TimeoutError) as err:
            await _refuse(send, _unavailable(err))
            return
        assert chunk.finish_reason is not None
        answer = Completion("".join(texts), token_ids, chunk.finish_reason)
        body = reply.whole(answer, usage_of(chunk.num_prompt_tokens, chunk.num_generated_tokens))
        await _respond(send, 200, encode_json(body))

    async def _stream(self, chunks: AsyncIterator[Chunk], reply: Reply, include_usage: bool, send: _Send) -> None:
        async def event(value: Any) -> None:
            await send({"type": "http.response.body", "body": encode_event(value), "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        try:
            async with asyncio.timeout(self._max_answer_s), aclosing(chunks):  # type: ignore[type-var]
                if first := reply.first():
                    await event(first)
                async for chunk in chunks:
                    if chunk.text or chunk.finish_reason:
                        await event(reply.delta(chunk.text, chunk.finish_reason))
            if include_usage:
                await event(reply.usage(usage_of(chunk.num_prompt_tokens, chunk.num_generated_tokens)))
            last = DONE
        except (EngineError, TimeoutError) as err:
            # The status is out already: clients know an error in the stream by its shape, and by the missing [DONE].
            last = encode_event(_unavailable(err).body())
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _check_model(self, name: str) -> None:
        if name != self._card.id:
            raise RequestError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")

    def _engine_or_503(self) -> None:
        try:
            self._engine.health()
        except EngineError as err:
            raise _unavailable(err) from err


_Send = Callable[[Any], Awaitable[None]]
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
]


def _unavailable(err: BaseException) -> RequestError:
    """503 without the engine's own words: they may quote paths or data. They go to the log."""
    if isinstance(err, TimeoutError):
        return RequestError(503, "the answer took too long; ask for fewer tokens", code="timeout")
    logger.error("engine: %s", err)
    return RequestError(503, "the model is not available at the moment; try again", code="engine_unavailable")


class _Worked(Response):
    """A response sent by a coroutine, which ends when the client leaves."""

    def __init__(self, work: Callable[[_Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        work = asyncio.ensure_future(self._work(send))
        gone = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also when Serve cancels us, its way to say that the client left
            finished = work.done()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if finished:
            work.result()


async def _until_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request) -> bytes:
    """The body, up to MAX_BODY_BYTES; nothing beyond is held in memory."""
    too_large = RequestError(413, f"the body exceeds {MAX_BODY_BYTES} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


async def _respond(send: _Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})


async def _refuse(send: _Send, error: RequestError) -> None:
    await _respond(send, error.status, encode_json(error.body()), _RETRY_AFTER if error.status == 503 else None)


def _on_request_error(_: Request, err: Exception) -> Response:
    assert isinstance(err, RequestError)
    return _Worked(lambda send: _refuse(send, err))


def _on_http_error(request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    messages = {404: f"unknown path {request.url.path}", 405: f"{request.method} is not possible here"}
    body = RequestError(err.status_code, messages.get(err.status_code, err.detail)).body()
    return JSONResponse(body, status_code=err.status_code, headers=err.headers)


class _Shield:
    """The last net: a surprise becomes a 500. Starlette's own would raise it again, and Serve then log its text."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as err:  # noqa: BLE001 - the client gets an answer, and the log no text that may quote a prompt
            kind = type(err).__name__
            frame = traceback.extract_tb(err.__traceback__)[-1]
            logger.error("unexpected %s in %s, line %s", kind, frame.filename, frame.lineno)
            if started or scope["type"] != "http":
                raise RuntimeError(f"unexpected {kind}") from None  # breaks the connection: no end is pretended
            await _refuse(send, RequestError(500, "an internal error; the server's log tells its kind"))
