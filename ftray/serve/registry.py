"""What may be served beside a base: `<storage>/published/<base>/<adapter>/<version>/`, committed and immutable.

Knows storage and what an adapter directory says; nothing of engines, HTTP or training. Replicas read it, `ftray publish`
writes it. A name of the registry is what was published under it; what a client asks for is only ever compared with those.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftray import storage
from ftray.engine.adapter import CONFIG_FILE, WEIGHTS_FILE, check_adapter, read_settings
from ftray.errors import CheckpointError, ConfigError, ModelError

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_VERSION = re.compile(r"(\d{4,})-[0-9a-f]{12}")
_MAX_HEADER_BYTES = 64 << 20


@dataclass(frozen=True)
class Published:
    """One version of an adapter. meta: base, revision, run, step, rank, published_at."""

    name: str
    version: str
    uri: str
    meta: dict[str, Any]


def base_name(base: str) -> str:
    """How clients call a base: the last part of a hub id, path or `embedded:` name, of plain characters."""
    last = re.split(r"[/:]", base.rstrip("/"))[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:63].strip("._-")
    return plain or "base"


def registry_of(place: str, base: str) -> str:
    """URI under which the adapters of a base lie. place: the `storage` of a run file."""
    return storage.join(storage.absolute(place), "published", base_name(base))


def check_name(name: str) -> str:
    """The name itself. Raises ConfigError for one that an adapter can't have."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} can't be an adapter's name: 1 to 63 letters, digits, '.', '_' or '-', with a letter or digit at "
            "both ends; choose another with --name"
        )
    return name


def list_published(registry: str, known: Mapping[str, Published] | None = None) -> dict[str, Published]:
    """The newest committed version of each adapter, by name.

    known: what an earlier call returned; what is immutable is not read again. Damaged manifests and foreign files are
    passed over. Raises StorageError.
    """
    versions: dict[str, list[tuple[int, str]]] = {}
    for file in storage.list_files(registry, suffix=f"/{storage.MANIFEST}"):
        parts = file.path.split("/")
        if len(parts) == 3 and NAME.fullmatch(parts[0]) and (found := _VERSION.fullmatch(parts[1])):
            versions.setdefault(parts[0], []).append((int(found[1]), parts[1]))
    adapters: dict[str, Published] = {}
    for name, found_versions in sorted(versions.items()):
        for _, version in sorted(found_versions, reverse=True):
            uri = storage.join(registry, name, version)
            if known and name in known and known[name].uri == uri:
                adapters[name] = known[name]
            elif (meta := _meta(uri)) is not None:
                adapters[name] = Published(name, version, uri, meta)
            if name in adapters:
                break
    return adapters


def _meta(uri: str) -> dict[str, Any] | None:
    try:
        manifest = storage.read_manifest(uri)
    except CheckpointError:
        return None
    return None if manifest is None else dict(manifest["meta"])


def publish(registry: str, name: str, source: str, base_weights: str, meta: dict[str, Any]) -> tuple[Published, bool]:
    """Commits the adapter at `source` as the newest version of `name`; False if it is that version already.

    source: committed directory with adapter_config.json and adapter_model.safetensors. base_weights: directory whose
    safetensors have the base's names and shapes. meta: base, revision, run, step. Raises ConfigError (the name),
    ModelError (not an adapter, damaged, or not this base's), StorageError.
    """
    manifest = storage.read_manifest(source) or {"files": {}}
    check_name(name)
    settings = read_settings(storage.read_bytes(storage.join(source, CONFIG_FILE)), source)
    shapes = tensor_shapes(storage.join(source, WEIGHTS_FILE))
    check_adapter(settings, shapes, _directory_shapes(base_weights), source)
    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        digest = hashlib.sha256()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            storage.download_file(storage.join(source, file), Path(scratch, file))
            with Path(scratch, file).open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256")
            if found.hexdigest() != manifest["files"].get(file, {}).get("sha256"):
                raise ModelError(f"{storage.join(source, file)} is damaged; write it again with `ftray export`")
            digest.update(found.digest())
        newest = list_published(registry).get(name)
        number = 1 if newest is None else int(newest.version.split("-")[0]) + 1
        if newest is not None and newest.version.endswith(digest.hexdigest()[:12]):
            return newest, False
        # Its contents are in its name: two who publish at once write two versions, or the same bytes.
        version = f"{number:04d}-{digest.hexdigest()[:12]}"
        uri = storage.join(registry, name, version)
        whole = {**meta, "rank": settings.rank, "published_at": datetime.now(UTC).isoformat(timespec="seconds")}
        created = storage.commit_directory(scratch, uri, whole)
    return Published(name, version, uri, whole), created


def remove(registry: str, name: str) -> int:
    """Takes an adapter away, all of its versions; returns how many. Raises ConfigError when there is none."""
    check_name(name)
    place = storage.join(registry, name)
    manifests = storage.list_files(place, suffix=storage.MANIFEST)
    if not manifests:
        there = ", ".join(list_published(registry)) or "none"
        raise ConfigError(f"no adapter {name} is published under {registry}; there are: {there}")
    storage.delete_tree(place)
    return len(manifests)


def tensor_shapes(uri: str) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file's tensors, from its header. Raises ModelError for another kind of file."""
    try:
        length = int.from_bytes(storage.read_range(uri, 0, 8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(length)
        header = json.loads(storage.read_range(uri, 8, 8 + length))
        return {str(name): list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{uri} is no safetensors file; write it again with `ftray export`") from None


def _directory_shapes(uri: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for info in storage.list_files(uri, suffix=".safetensors"):
        shapes |= tensor_shapes(info.uri)
    return shapes
