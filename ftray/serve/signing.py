"""Signatures of published adapters: Ed25519, a key per organization.

A signature covers the name, the version and the manifest with the sha256 of every file, so that a signed entry can be
neither changed nor offered under another name or version. Does not know the registry.
"""

from __future__ import annotations

import base64
import binascii
import json
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ftray.errors import ConfigError

PREFIX = "ed25519:"
_PURPOSE = "ftray published adapter v1"
_MAX_KEY_FILE_BYTES = 1 << 16


class Signer:
    """Signs entries with a private key.

    Args:
        path: A PEM file with an Ed25519 private key without password, as `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        ConfigError: The file is unreadable, other users can read it, or it contains another kind of key.
    """

    def __init__(self, path: str) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

        try:
            mode = Path(path).stat().st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"--sign {path} is not a file; use a PEM file with an Ed25519 private key")
            with Path(path).open("rb") as file:
                text = file.read(_MAX_KEY_FILE_BYTES)
        except OSError as err:
            raise ConfigError(f"--sign {path} cannot be read ({err.strerror}); correct the path") from None
        if mode & 0o077:
            raise ConfigError(f"--sign {path} can be read by other users; run: chmod 600 {path}")
        try:
            key = load_pem_private_key(text, password=None)
        except (ValueError, TypeError, NotImplementedError):
            key = None
        except Exception as err:  # noqa: BLE001 - cryptography's UnsupportedAlgorithm derives from Exception
            raise ConfigError(f"--sign {path} cannot be used ({type(err).__name__}); create an Ed25519 key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(
                f"--sign {path} is not an Ed25519 private key without a password; create one: "
                f"openssl genpkey -algorithm ed25519 -out {path}"
            )
        self._key = key
        public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public_key = PREFIX + base64.b64encode(public).decode()

    def sign(self, name: str, version: str, files: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, str]:
        """The entry's `signature`: the public key and the signature of everything else in the manifest."""
        signature = self._key.sign(_payload(name, version, files, meta))
        return {"key": self.public_key, "value": base64.b64encode(signature).decode()}


def wrong_signature(
    name: str, version: str, files: Mapping[str, Any], meta: Mapping[str, Any], trusted: Collection[str]
) -> str | None:
    """The reason to reject an entry's signature, or None if a trusted key signed exactly this entry."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signature = meta.get("signature")
    if signature is None:
        return "it is not signed, but serve.trusted_keys requires a signature"
    if not isinstance(signature, Mapping) or not all(isinstance(signature.get(k), str) for k in ("key", "value")):
        return "its signature is malformed"
    if signature["key"] not in trusted:
        return f"the key {signature['key'][:60]!r} that signed it is not in serve.trusted_keys"
    value = _decode(signature["value"])
    try:
        public = Ed25519PublicKey.from_public_bytes(_decode(signature["key"].removeprefix(PREFIX)))
        public.verify(value, _payload(name, version, files, meta))
    except (InvalidSignature, ValueError):
        return "its signature does not match its content, name and version"
    return None


def _payload(name: str, version: str, files: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    signed = {key: value for key, value in meta.items() if key != "signature"}
    tree = [_PURPOSE, name, version, dict(files), signed]
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError):
        return b""
