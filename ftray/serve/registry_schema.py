"""One entry of the registry, `<name>/<version>/manifest.json`: read with bounds and checked against a strict schema.

Everybody with write access to the registry writes these files. A wrong entry is rejected with a reason; all others are served.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ftray import storage
from ftray.engine.adapters import CONFIG_FILE, MAX_CONFIG_BYTES, MAX_RANK, WEIGHTS_FILE
from ftray.serve.signing import wrong_signature
from ftray.storage import strict_json

MAX_MANIFEST_BYTES = 256 << 10
MAX_MANIFEST_DEPTH = 8
LINEAGE = r"[A-Za-z0-9._-]{1,128}"
Kind = Literal["damaged", "metadata", "size", "signature", "base", "link", "limit", "unreadable", "unexpected"]


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


_Text = Annotated[str, StringConstraints(max_length=1024)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Reference(_StrictModel):
    """Statistics of a training set: nine deciles of the prompts' lengths in tokens, and each script's share of the letters."""

    prompt_tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=9)] = []
    scripts: Annotated[dict[Annotated[str, StringConstraints(max_length=64)], _Share], Field(max_length=256)] = {}


class Meta(_StrictModel):
    """An entry's description of its adapter. Unknown fields of later versions are ignored."""

    base: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    revision: _Text | None = None
    run: _Text | None = None
    step: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None
    published_at: Annotated[str, StringConstraints(max_length=64)] | None = None
    owner: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    lineage: Annotated[str, StringConstraints(pattern=f"^{LINEAGE}$")] | None = None
    reference: Reference | None = None
    signature: dict[str, str] | None = None


class _ManifestFile(_StrictModel):
    size: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(_StrictModel):
    files: Annotated[dict[str, _ManifestFile], Field(max_length=8)]
    meta: Meta


@dataclass(frozen=True)
class PublishedAdapter:
    """One version of an adapter. meta: from its manifest, checked. sha256: of each file, by name."""

    name: str
    version: str
    uri: str
    meta: dict[str, Any]
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Rejected:
    """A version that is not served.

    Attributes:
        etag: Of its manifest. The entry is read again when it changes.
        retry_s: Monotonic time at which an unreadable entry is read again.
    """

    name: str
    version: str
    uri: str
    kind: Kind
    reason: str
    etag: str = ""
    retry_s: float = field(default=0.0, compare=False)

    @property
    def is_transient(self) -> bool:
        return self.kind == "unreadable"

    def __str__(self) -> str:
        return f"{self.uri} is not served: {self.reason}"


class _Wrong(Exception):
    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def read_entry(
    name: str,
    version: str,
    manifest: storage.FileInfo,
    uri: str,
    trusted: Collection[str] = (),
    max_adapter_bytes: int | None = None,
) -> PublishedAdapter | Rejected:
    """Reads and checks one entry; never raises for what it holds.

    Args:
        name: The adapter's, from the path.
        version: The version's directory.
        manifest: The file as it was listed.
        uri: The entry's directory.
        trusted: Public keys, one of which must have signed the entry; without keys, signatures are not checked.
        max_adapter_bytes: Largest weights file; None: any.

    Raises:
        StorageError: The store cannot be read; the entry may be valid.
    """
    try:
        return _read(name, version, manifest, uri, trusted, max_adapter_bytes)
    except _Wrong as wrong:
        return Rejected(name, version, uri, wrong.kind, wrong.reason, manifest.etag)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as err:
        reason = f"it cannot be read ({type(err).__name__}); publish it again"  # the checks above have a gap: report it
        return Rejected(name, version, uri, "unexpected", reason, manifest.etag)


def _read(
    name: str,
    version: str,
    manifest: storage.FileInfo,
    uri: str,
    trusted: Collection[str],
    max_adapter_bytes: int | None,
) -> PublishedAdapter:
    if manifest.size_bytes > MAX_MANIFEST_BYTES:
        raise _Wrong("size", f"its manifest has {manifest.size_bytes} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        data = storage.read_range(manifest.uri, 0, MAX_MANIFEST_BYTES + 1)
    except storage.MissingFile:
        raise _Wrong("damaged", "its manifest disappeared while it was read") from None
    try:
        tree = strict_json.parse(data, max_bytes=MAX_MANIFEST_BYTES, max_depth=MAX_MANIFEST_DEPTH)
    except ValueError as err:
        raise _Wrong("damaged", f"its manifest is not valid JSON: {err}; publish it again") from None
    if not isinstance(tree, dict) or tree.keys() != {"files", "meta", "sha256"} or tree.pop("sha256") != _sum_of(tree):
        raise _Wrong("damaged", "its manifest is damaged: its sha256 is missing or wrong; publish it again")
    try:
        checked = _Manifest.model_validate(tree)
    except ValidationError as err:
        raise _Wrong("metadata", f"its manifest {first_error(err)}; publish it again") from None
    _check_files(checked, max_adapter_bytes)
    if trusted and (reason := wrong_signature(name, version, tree["files"], tree["meta"], trusted)):
        raise _Wrong("signature", reason)
    sums = {path: entry.sha256 for path, entry in checked.files.items()}
    if not version.endswith(content_of(sums)):
        raise _Wrong("metadata", "its files do not match the hash in its version; publish it again")
    return PublishedAdapter(name, version, uri, checked.meta.model_dump(exclude_unset=True), sums)


def _check_files(manifest: _Manifest, max_adapter_bytes: int | None) -> None:
    if manifest.files.keys() != {CONFIG_FILE, WEIGHTS_FILE}:
        raise _Wrong(
            "metadata", f"its manifest names other files than {CONFIG_FILE} and {WEIGHTS_FILE}; publish it again"
        )
    if manifest.files[CONFIG_FILE].size > MAX_CONFIG_BYTES:
        raise _Wrong("size", f"its {CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
    size = manifest.files[WEIGHTS_FILE].size
    if max_adapter_bytes is not None and size > max_adapter_bytes:
        reason = f"its weights have {size / 1e6:,.0f} MB; serve.max_adapter_mb is {max_adapter_bytes / 1e6:,.0f}"
        raise _Wrong("size", reason)


def content_of(sums: Mapping[str, str]) -> str:
    """The part of a version's name that depends on its files."""
    digest = hashlib.sha256()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update(bytes.fromhex(sums[file]))
    return digest.hexdigest()[:12]


def first_error(err: ValidationError) -> str:
    """The first error of a schema as a clause: `is malformed at meta.step: input should be …`."""
    first = err.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:40] for part in first["loc"])
    return f"is malformed at {re.sub(r'[^ -~]', '?', where)}: {first['msg'][:1].lower()}{first['msg'][1:200]}"


def _sum_of(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
