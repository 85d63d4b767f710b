"""Reads bodies, sends responses, and renders errors in OpenAI's shape, for every route. Knows no engine and no route."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from ftray.serve.openai import MAX_BODY_BYTES, RequestError, encode_json

Send = Callable[[Any], Awaitable[None]]
MAX_BODY_S = 30.0  # for a body to arrive
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # keeps nginx from buffering the stream
]
logger = logging.getLogger(__name__)


class StreamedResponse(Response):
    """A response that a coroutine sends. It ends when the client leaves."""

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        work = asyncio.ensure_future(self._work(send))
        gone = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also if Serve cancels this task because the client left
            finished = work.done()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if finished:
            work.result()


async def _until_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body, up to max_bytes; no more is held in memory. Raises RequestError: 413, or 408 for a slow body."""
    too_large = RequestError(413, f"the body exceeds {max_bytes} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {MAX_BODY_S:g} s", code="timeout") from None
    return bytes(body)


async def respond(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """Sends a whole JSON response."""
    whole = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode(), value.encode()) for name, value in whole.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, error: RequestError) -> None:
    """Sends an error as a whole response."""
    await respond(send, error.status, encode_json(error.body()), error.headers)


def unavailable(err: BaseException) -> RequestError:
    """A 503 without the engine's message, which may quote paths or data and goes to the log."""
    if isinstance(err, TimeoutError):
        return RequestError(503, "the answer took too long; ask for fewer tokens", code="timeout")
    logger.error("engine: %s", err)
    return RequestError(503, "the model is not available at the moment; try again", code="engine_unavailable")


def on_request_error(_: Request, err: Exception) -> Response:
    """Starlette's handler for RequestError."""
    assert isinstance(err, RequestError)
    return StreamedResponse(lambda send: refuse(send, err))


def on_http_error(request: Request, err: Exception) -> Response:
    """Starlette's handler for its own errors."""
    assert isinstance(err, HTTPException)
    path = str(request.scope["path"])[:200]  # request.url fails for some Host headers
    messages = {404: f"unknown path {path}", 405: f"{request.method[:20]} is not supported here"}
    body = RequestError(err.status_code, messages.get(err.status_code, err.detail)).body()
    headers = {**(err.headers or {}), "content-type": "application/json"}
    return Response(encode_json(body), status_code=err.status_code, headers=headers)


class ErrorMiddleware:
    """Turns an unexpected exception into a 500. Starlette's own middleware would raise it again, and Serve would log its text."""

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
                raise RuntimeError(
                    f"unexpected {kind}"
                ) from None  # breaks the connection, so the answer does not look complete
            await refuse(send, RequestError(500, "internal error; see the server's log"))


def with_cors(app: Any, origins: Sequence[str]) -> Any:
    """Answers browsers' preflight requests, which carry no key, and names the allowed origins in every answer."""
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["retry-after"],
        max_age=3600,
    )
