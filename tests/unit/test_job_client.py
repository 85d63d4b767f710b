"""The client of a cluster's job server, in front of servers that are something else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ftray.cluster.jobs import JobClient
from ftray.errors import ConfigError


@contextmanager
def server(status: int, body: bytes, kind: str) -> Iterator[str]:
    """A server that gives one answer to everything; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the base class's name

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b"<html>welcome</html>", "text/html"),
        (200, b"{}", "application/json"),
        (200, b"[1]", "application/json"),
        (200, b"null", "application/json"),
        (200, b"\xff\xfe", "application/octet-stream"),
        (404, b"not found", "text/plain"),
        (302, b"", "text/plain"),
    ],
)
def test_a_server_that_is_no_dashboard_is_one_sentence(status: int, body: bytes, kind: str) -> None:
    with server(status, body, kind) as address, pytest.raises(ConfigError) as error:
        JobClient(address)
    assert f"--address {address}" in str(error.value)
    assert "Ray dashboard" in str(error.value)
    assert "\n" not in str(error.value)
