"""A change to uvicorn, which bounds no headers with httptools. Knows nothing of what is served."""

from __future__ import annotations

import asyncio
from typing import Any

MAX_HEADER_BYTES = 64 << 10
MAX_HEADER_S = 30.0


def uvicorn_with_bounded_headers(max_bytes: int = MAX_HEADER_BYTES, max_s: float = MAX_HEADER_S) -> None:
    """Makes uvicorn servers that are started later bound a request's headers, in bytes and in time.

    Reason: with httptools, which uvicorn takes where it is installed, headers have no bound: a client can fill the proxy's
    memory, or hold connections open a byte at a time. Ray Serve passes no option for it. A request beyond `max_bytes` is
    answered 431; one whose headers take longer than `max_s`, a new connection that sends nothing included, is cut off.
    Test: tests/unit/test_security_api_client.py. Upstream: uvicorn/protocols/http/httptools_impl.py.
    """
    import uvicorn.protocols.http.auto as chosen

    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:  # h11 bounds them by itself
        return

    class BoundedHeaders(HttpToolsProtocol):
        _in_headers, _num_bytes = True, 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if not self._in_headers:
                self._begin()

        def on_headers_complete(self) -> None:
            self._end()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            self._num_bytes += len(data)
            super().data_received(data)
            if self._in_headers and self._num_bytes > max_bytes and not self.transport.is_closing():
                body = b"the headers are too large\n"
                head = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
                self.transport.write(head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                self.transport.close()

        def _begin(self) -> None:
            self._in_headers, self._num_bytes = True, 0
            self._timer = self.loop.call_later(max_s, self.transport.close)

        def _end(self) -> None:
            self._in_headers = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    chosen.AutoHTTPProtocol = BoundedHeaders
