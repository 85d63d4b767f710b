"""API keys: who may ask. Knows nothing of models, Ray or what is asked.

Keys themselves stay in the driver's environment; replicas only ever hold their sha256.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from typing import Any

from ftray.errors import ConfigError
from ftray.serve.protocol import RequestError, encode_json

ENV = "FTRAY_API_KEY"
OPEN_PATHS = frozenset({"/health"})


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_key_hashes(host: str) -> tuple[str, ...]:
    """Hashes of the keys in FTRAY_API_KEY (several: separated by commas).

    Raises ConfigError when there is none and `host` can be reached from other machines.
    """
    keys = [key.strip() for key in os.environ.get(ENV, "").split(",")]
    hashes = tuple(hash_key(key) for key in keys if key)
    if not hashes and not _is_loopback(host):
        raise ConfigError(
            f"serve.host is {host}, which other machines can reach, but no API key is set; "
            f"set {ENV} (several keys: separated by commas), or use serve.host: 127.0.0.1"
        )
    return hashes


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name: who knows where it leads
        return False


class KeyGuard:
    """ASGI middleware around the whole app: all but the open paths need a key. Without keys, nothing does."""

    def __init__(self, app: Any, key_hashes: tuple[str, ...]) -> None:
        self._app = app
        self._hashes = key_hashes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        error = RequestError(
            401,
            "the API key is missing or wrong; send it as `Authorization: Bearer …`",
            code="invalid_api_key",
        )
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": encode_json(error.body())})

    def _may_pass(self, scope: Any) -> bool:
        if not self._hashes or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            return True
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, key = (headers[0] if len(headers) == 1 else b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).hexdigest()
        # All are compared, whichever fits: time tells nothing about how many keys there are or which one came close.
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]
        return kind.lower() == b"bearer" and any(matches)
