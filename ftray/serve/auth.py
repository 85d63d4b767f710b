"""API keys. Knows nothing of models, Ray or requests.

Keys stay in the driver's environment, or in a file such as a mounted Secret. Replicas only have their SHA-256 hashes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path
from typing import Any

from ftray.errors import ConfigError
from ftray.network import is_loopback
from ftray.serve.openai import RequestError, encode_json

ENV = "FTRAY_API_KEY"
FILE_ENV = "FTRAY_API_KEY_FILE"
OPEN_PATHS = frozenset({"/health", "/", "/docs", "/openapi.json", "/page.css", "/chat.js", "/docs.js"})
CALLER = "ftray.caller"  # in an ASGI scope: the hash of the caller's key


HASH_PREFIX = "sha256:"  # a line of the key file may hold a key's hash instead of the key
NONCE_CHARS, MAC_CHARS = 24, 16


def answer_id(kind: str, caller: str) -> str:
    """A new id for an answer, which shows later whose answer it was.

    Args:
        kind: Its prefix, e.g. `chatcmpl`.
        caller: The caller's hashed key; "" if the endpoint has no keys.

    Returns:
        `<kind>-<nonce><code>`. The code is an HMAC of kind and nonce with the caller's hashed key, so every replica
        recognizes the answers of a key without storing them.
    """
    nonce = secrets.token_hex(NONCE_CHARS // 2)
    return f"{kind}-{nonce}{_code(kind, nonce, caller)}"


def is_answer_of(answer: str, caller: str) -> bool:
    """Whether an id belongs to an answer to this caller."""
    kind, _, rest = answer.partition("-")
    nonce, code = rest[:NONCE_CHARS], rest[NONCE_CHARS:]
    return hmac.compare_digest(code.encode("utf-8", "replace"), _code(kind, nonce, caller).encode())


def key_id(caller: str) -> str:
    """The id of a key in records. Neither the key nor its hash can be derived from it. "" without keys."""
    return hashlib.sha256(f"ftray key id {caller}".encode()).hexdigest()[:16] if caller else ""


def _code(kind: str, nonce: str, caller: str) -> str:
    text = f"{kind}-{nonce}".encode("utf-8", "replace")
    return hmac.new(caller.encode() or b"none", text, hashlib.sha256).hexdigest()[:MAC_CHARS]


def hash_key(key: str) -> str:
    """The SHA-256 hash of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_key_hashes(host: str) -> tuple[str, ...]:
    """Reads the API keys and returns their SHA-256 hashes.

    Keys come from FTRAY_API_KEY (comma-separated) and from the file that FTRAY_API_KEY_FILE names (one per line). An
    entry is a key, or `sha256:` and the hash of a key in hexadecimal, so that no plain key has to be stored.

    Args:
        host: The address to listen on. Keys are optional on loopback only.

    Raises:
        ConfigError: Other machines can reach `host` and there is no key, a hash is malformed, or the file is unreadable.
    """
    keys = [key.strip() for key in os.environ.get(ENV, "").split(",")] + _keys_of_file()
    hashes = tuple(_hash_of(key) for key in keys if key)
    if not hashes and not is_loopback(host):
        raise ConfigError(
            f"serve.host is {host}, which other machines can reach, but no API key is set; "
            f"set {ENV} (several keys: separated by commas) or {FILE_ENV}, or use serve.host: 127.0.0.1"
        )
    return hashes


def _hash_of(entry: str) -> str:
    if not entry.startswith(HASH_PREFIX):
        return hash_key(entry)
    digest = entry.removeprefix(HASH_PREFIX)
    if not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise ConfigError(
            f"{ENV} or {FILE_ENV} has a malformed {HASH_PREFIX} entry; write {HASH_PREFIX} and the 64 hexadecimal digits "
            "of the key's hash"
        )
    return digest.lower()


def _keys_of_file() -> list[str]:
    path = os.environ.get(FILE_ENV)
    if not path:
        return []
    try:
        keys = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not a text file"
        raise ConfigError(f"{FILE_ENV} {path} cannot be read ({reason}); use a file with one key per line") from None
    if not any(keys):  # an empty Secret must not disable authentication
        raise ConfigError(f"{FILE_ENV} {path} contains no key; write one per line, or unset {FILE_ENV}")
    return keys


class AuthMiddleware:
    """ASGI middleware around the app: all paths except the open ones need a key, unless there are no keys."""

    def __init__(self, app: Any, key_hashes: tuple[str, ...]) -> None:
        self._app = app
        self._hashes = key_hashes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # before it is accepted: servers answer 403
            await send({"type": "websocket.close", "code": 1008, "reason": "the API key is missing or wrong"})
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
        # All keys are compared, so the time does not depend on their number or on a partial match.
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]
        scope[CALLER] = digest
        return kind.lower() == b"bearer" and any(matches)
