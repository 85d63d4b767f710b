"""The client of a cluster's job server, in front of servers that are something else."""

from __future__ import annotations

import pytest

from ftray.cluster.jobs import JobClient
from ftray.errors import ConfigError
from tests.http_server import http_server


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
    reply = (status, {"content-type": kind}, body)
    with http_server(lambda *_: reply) as address, pytest.raises(ConfigError) as error:
        JobClient(address)
    assert f"--address {address}" in str(error.value)
    assert "Ray dashboard" in str(error.value)
    assert "\n" not in str(error.value)
