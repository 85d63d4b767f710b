"""Middleware in Serve's proxy: turns its refusals and broken answers into OpenAI's shape.

Serve refuses with text/plain, and is silent if a replica dies. Here a refusal becomes OpenAI's error body, an answer that
never
began becomes a 503, and a stream that breaks off ends with an error event, without [DONE]. Serve loads this through an
environment
variable, which must be set where Ray's nodes start. Knows nothing of models or replicas.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.middleware import Middleware

from ftray.compat.uvicorn import uvicorn_with_bounded_headers
from ftray.serve.asgi import Send, refuse
from ftray.serve.openai import RequestError
from ftray.serve.openai_answers import encode_event

# Of Ray's nodes. Proxies talk to replicas by gRPC, where a token costs about half of the processor time that it takes as an
# object of Ray's; a whole answer with log probabilities may have more than the 4 MiB that gRPC allows by itself.
SETTINGS = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ftray.serve.proxy:middlewares",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
}
_TIMEOUT_HEADER = "x-request-timeout-seconds"
_GONE = "the model became unavailable during the answer; try again"


def announce() -> None:
    """Makes a Ray that this process starts load the middleware. Existing variables are kept."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def middlewares() -> list[Middleware]:
    """Called by Serve in each proxy, before the HTTP server starts."""
    uvicorn_with_bounded_headers()
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):  # gRPC would ask these for the way to replicas
        os.environ.pop(name, None)
    return [Middleware(ProxyMiddleware)]


class ProxyMiddleware:
    """ASGI middleware around a proxy. Serve's own paths (`/-/…`) stay as they are."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if "headers" in scope:
            scope = {**scope, "headers": [pair for pair in scope["headers"] if _may_pass(*pair)]}
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        answer = _ProxiedResponse(send)
        await self._app(scope, receive, answer.send)
        await answer.end()


def _may_pass(name: bytes, value: bytes) -> bool:
    """Whether Serve may see a header: it fails on undecodable ones, and one would let clients change the time limit."""
    try:
        value.decode()
        return name.decode().lower() != _TIMEOUT_HEADER
    except UnicodeDecodeError:
        return False


class _ProxiedResponse:
    """One answer in transit, and how much of it has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_out = self._is_stream = self._is_over = False
        self._refusal: RequestError | None = None

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message.get("headers", ()))
            kind = headers.get(b"content-type", b"")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):  # replicas refuse with JSON
                self._refusal = _refusal(message["status"], headers.get(b"retry-after"))
                return
            self._is_out, self._is_stream = True, kind.startswith(b"text/event-stream")
        elif self._refusal is not None:
            return
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_over = True
        await self._send(message)

    async def end(self) -> None:
        """Completes the answer if it is incomplete. No effect if the client left."""
        gone = RequestError(503, _GONE, code="engine_unavailable")
        if not self._is_out:
            await refuse(self._send, self._refusal or gone)
        elif self._is_stream and not self._is_over:
            await self._send({"type": "http.response.body", "body": encode_event(gone.body()), "more_body": False})


def _refusal(status: int, retry_after: bytes | None) -> RequestError:
    if status in (429, 503):
        wait_s = float(retry_after) if retry_after is not None and retry_after.isdigit() else None
        message = "too many requests are waiting, or no replica is ready; try again"
        return RequestError(status, message, code="overloaded", retry_after_s=wait_s)
    if status >= 500:
        return RequestError(503, _GONE, code="engine_unavailable")
    return RequestError(status, {404: "nothing is served at this path"}.get(status, "this request cannot be answered"))
