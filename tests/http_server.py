"""A real HTTP server for a test, which answers with a function."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, Mapping[str, str], bytes]  # status, headers, body


@contextmanager
def http_server(answer: Callable[[str, Mapping[str, str], bytes], Reply]) -> Iterator[str]:
    """Serves on a free port of this machine; yields its address without a path.

    Args:
        answer: The reply to a path, headers and a body.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            status, headers, data = answer(self.path, self.headers, body)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # a client may leave early
                self.end_headers()
                self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 - the base class's name

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
