"""The published adapters of a base: `<storage>/published/<base>/<adapter>/<version>/`, committed and immutable.

Knows storage and adapter directories, but not engines, HTTP or training. `ftray publish` writes the registry, replicas read it.
A client's model name is only compared with names in the registry.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftray import storage
from ftray.engine.adapters import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    TensorInfo,
    adapter_shapes,
    check_adapter,
    header_length,
    read_header,
    read_settings,
)
from ftray.errors import ConfigError, ModelError, StorageError
from ftray.serve.registry_schema import PublishedAdapter, Rejected, content_of, read_entry
from ftray.serve.signing import Signer

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
MAX_NAMES = 10_000  # adapters of one base
MAX_VERSIONS_TRIED = 100  # of one adapter, from the newest to the first servable one
UNREADABLE_S = 30.0  # between two reads of an entry that the store does not return
_MAX_NUMBER = 999_999_999
_VERSION = re.compile(r"(\d{4,9})-[0-9a-f]{12}")


@dataclass(frozen=True)
class Scan:
    """The result of reading the registry. adapters: the served version of each adapter, by name. rejected: by URI."""

    adapters: Mapping[str, PublishedAdapter] = field(default_factory=dict)
    rejected: Mapping[str, Rejected] = field(default_factory=dict)


def base_name(base: str) -> str:
    """A base's name for clients: the last part of a hub id, path or `embedded:` name, in plain characters."""
    last = re.split(r"[/:]", base.rstrip("/"))[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:63].strip("._-")
    return plain or "base"


def registry_of(place: str, base: str) -> str:
    """URI of the adapters of a base. place: the `storage` of a run file."""
    return storage.join(storage.absolute(place), "published", base_name(base))


def check_name(name: str) -> str:
    """Returns the name. Raises ConfigError if an adapter cannot have it."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be an adapter's name. A name has 1 to 63 letters, digits, '.', '_' or '-', with a letter or "
            "digit at both ends; choose another with --name"
        )
    return name


def list_published(registry: str, trusted: Collection[str] = ()) -> dict[str, PublishedAdapter]:
    """The newest servable version of each adapter, by name. Raises StorageError."""
    return dict(scan(registry, trusted=trusted).adapters)


def scan(
    registry: str,
    known: Scan | None = None,
    *,
    trusted: Collection[str] = (),
    max_adapter_bytes: int | None = None,
) -> Scan:
    """Reads every entry of a registry.

    Args:
        registry: URI of the registry.
        known: Result of an earlier read. Versions are immutable, so known ones are not read again.
        trusted: Public keys, one of which must have signed an entry. Without keys, signatures are not checked.
        max_adapter_bytes: Largest weights file of an entry; None: any.

    Returns:
        The newest servable version of each adapter, and the newer ones that are rejected.

    Raises:
        StorageError: The registry itself cannot be listed.
    """
    known = known or Scan()
    versions, rejected = _versions(registry)
    adapters: dict[str, PublishedAdapter] = {}
    for name, entries in sorted(versions.items())[:MAX_NAMES]:
        before = known.adapters.get(name)
        for version, manifest in sorted(entries, key=_age, reverse=True)[:MAX_VERSIONS_TRIED]:
            uri = storage.join(registry, name, version)
            if before is not None and before.uri == uri:
                adapters[name] = before
                break
            one: PublishedAdapter | Rejected
            rejection = known.rejected.get(uri)
            if (
                rejection is not None
                and rejection.etag == manifest.etag
                and not (rejection.is_transient and time.monotonic() >= rejection.retry_s)
            ):
                one = rejection
            else:
                one = _read_one(name, version, manifest, uri, trusted, max_adapter_bytes)
            if isinstance(one, PublishedAdapter):
                adapters[name] = one
                break
            rejected[uri] = one
    if len(versions) > MAX_NAMES:
        reason = f"the registry holds {len(versions)} adapters; only the first {MAX_NAMES} by name are served"
        rejected[registry] = Rejected("", "", registry, "limit", reason)
    return Scan(adapters, rejected)


def _read_one(
    name: str,
    version: str,
    manifest: storage.FileInfo,
    uri: str,
    trusted: Collection[str],
    max_adapter_bytes: int | None,
) -> PublishedAdapter | Rejected:
    """As `read_entry`. An entry that the store cannot read is skipped for a while; the others are served."""
    try:
        with storage.brief(5.0):
            return read_entry(name, version, manifest, uri, trusted, max_adapter_bytes)
    except StorageError as err:
        retry_s = time.monotonic() + UNREADABLE_S
        return Rejected(name, version, uri, "unreadable", f"it could not be read: {err}", manifest.etag, retry_s)


def _age(version: tuple[str, storage.FileInfo]) -> tuple[int, str]:
    return int(version[0].split("-")[0]), version[0]


def _versions(registry: str) -> tuple[dict[str, list[tuple[str, storage.FileInfo]]], dict[str, Rejected]]:
    """Versions with a manifest, by name. Symbolic links are rejected, foreign files ignored."""
    rejected: dict[str, Rejected] = {}
    manifests: Iterable[storage.FileInfo]
    if storage.is_remote(registry):
        manifests = storage.list_files(registry, suffix=f"/{storage.MANIFEST}")
    else:
        manifests = _walk(registry, rejected)
    versions: dict[str, list[tuple[str, storage.FileInfo]]] = {}
    for file in manifests:
        parts = file.path.split("/")
        if len(parts) == 3 and NAME.fullmatch(parts[0]) and _VERSION.fullmatch(parts[1]):
            versions.setdefault(parts[0], []).append((parts[1], file))
    return versions, rejected


def _walk(registry: str, rejected: dict[str, Rejected]) -> Iterable[storage.FileInfo]:
    """Yields `*/*/manifest.json` without following links, which could lead to an endless tree or a pipe, for example."""
    for name in _entries(Path(registry)):
        for version in _entries(Path(name.path), name):
            links = [entry for entry in (name, version) if entry.is_symlink()]
            path = Path(version.path, storage.MANIFEST)
            try:
                status = path.lstat()
            except OSError:
                continue
            uri = version.path
            if links or not stat.S_ISREG(status.st_mode):
                reason = f"{links[0].path if links else path} is a symbolic link or not a regular file"
                rejected[uri] = Rejected(name.name, version.name, uri, "link", reason)
                continue
            etag = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
            relative = f"{name.name}/{version.name}/{storage.MANIFEST}"
            yield storage.FileInfo(str(path), relative, status.st_size, etag)


def _entries(directory: Path, adapter: os.DirEntry[str] | None = None) -> list[os.DirEntry[str]]:
    """The entries of a directory, or nothing. The registry itself may be a link; links of adapters are visible in the entries."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as err:
        if adapter is not None:  # one adapter's directory is not readable: the others are served
            return []
        raise StorageError(f"{directory} cannot be read: {err.strerror}; check its owner and mode") from err


def publish(
    registry: str,
    name: str,
    source: str,
    base_weights: str,
    meta: dict[str, Any],
    *,
    owner: str | None = None,
    signer: Signer | None = None,
    take_over: bool = False,
) -> tuple[PublishedAdapter, bool]:
    """Commits the adapter at `source` as the newest version of `name`.

    Args:
        registry: URI of the registry.
        name: The adapter's name for clients.
        source: Committed directory with adapter_config.json and adapter_model.safetensors.
        base_weights: Directory whose safetensors have the base's names and shapes.
        meta: base, revision, run, step; lineage and reference if known.
        owner: The publisher, stored in the entry.
        signer: Signs the entry.
        take_over: Publish even if the name belongs to somebody else.

    Returns:
        The entry, and whether it is new: False if the newest version has the same files.

    Raises:
        ConfigError: The name is invalid, or belongs to another owner.
        ModelError: The source is not an adapter, is damaged, or was trained on another base.
        StorageError: The registry cannot be read or written.
    """
    manifest = storage.read_manifest(source) or {"files": {}}
    check_name(name)
    settings = read_settings(storage.read_range(storage.join(source, CONFIG_FILE), 0, MAX_CONFIG_BYTES + 1), source)
    shapes = adapter_shapes(_tensors(storage.join(source, WEIGHTS_FILE)), source)
    check_adapter(settings, shapes, _directory_shapes(base_weights), source)
    newest = list_published(registry).get(name)
    if newest is not None and not take_over:
        _check_owner(name, newest, owner, signer)
    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        sums = _copy_verified(source, manifest, scratch)
        content = content_of(sums)
        number = _next_number(registry, name)
        if (
            newest is not None
            and newest.version.endswith(content)
            and (signer is None or _is_signed_by(newest, signer))
        ):
            return newest, False
        # The name contains a hash of the files: concurrent publishers write two versions, or the same bytes.
        version = f"{number:04d}-{content}"
        uri = storage.join(registry, name, version)
        metadata = {**meta, "rank": settings.rank, "published_at": datetime.now(UTC).isoformat(timespec="seconds")}
        metadata |= {} if owner is None else {"owner": owner}
        if signer is not None:
            files = {f: {"size": Path(scratch, f).stat().st_size, "sha256": sum_} for f, sum_ in sums.items()}
            metadata["signature"] = signer.sign(name, version, files, metadata)
        created = storage.commit_directory(scratch, uri, metadata)
    return PublishedAdapter(name, version, uri, metadata, sums), created


def _next_number(registry: str, name: str) -> int:
    numbers = [int(version.split("-")[0]) for version, _ in _versions(registry)[0].get(name, [])]
    number = 1 + max(numbers, default=0)
    if number > _MAX_NUMBER:
        raise ConfigError(
            f"{name} has a version {number - 1}, the last possible one; remove {name}, or choose another --name"
        )
    return number


def _is_signed_by(entry: PublishedAdapter, signer: Signer) -> bool:
    return bool(entry.meta.get("signature", {}).get("key") == signer.public_key)


def _copy_verified(source: str, manifest: Mapping[str, Any], scratch: str) -> dict[str, str]:
    """Copies an adapter's files and returns their sha256. Raises ModelError if one differs from the manifest."""
    sums = {}
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        storage.download_file(storage.join(source, file), Path(scratch, file))
        with Path(scratch, file).open("rb") as opened:
            sums[file] = hashlib.file_digest(opened, "sha256").hexdigest()
        if sums[file] != manifest["files"].get(file, {}).get("sha256"):
            raise ModelError(f"{storage.join(source, file)} is damaged; write it again with `ftray export`")
    return sums


def _check_owner(name: str, newest: PublishedAdapter, owner: str | None, signer: Signer | None) -> None:
    """Raises ConfigError if a name belongs to somebody else. An entry without owner and signature belongs to nobody."""
    theirs, key = newest.meta.get("owner"), newest.meta.get("signature", {}).get("key")
    if key is not None and (signer is None or signer.public_key != key):
        raise ConfigError(
            f"{name} is signed with the key {key}; sign with that key (--sign), choose another --name, or "
            "take the name over with --take-over"
        )
    if theirs is not None and theirs != owner:
        raise ConfigError(
            f"{name} is published by {theirs!r}, and you are {owner!r}; choose another --name, set --owner if that is "
            "you, or take the name over with --take-over"
        )


def remove(
    registry: str, name: str, *, owner: str | None = None, signer: Signer | None = None, take_over: bool = False
) -> int:
    """Removes all versions of an adapter.

    Returns:
        The number of versions.

    Raises:
        ConfigError: There is no adapter of that name, or it belongs to another owner and `take_over` is False.
    """
    check_name(name)
    place = storage.join(registry, name)
    versions, rejected = _versions(registry)
    number = len(versions.get(name, [])) + sum(one.name == name for one in rejected.values())
    if not number:
        published = ", ".join(list_published(registry)) or "none"
        raise ConfigError(f"no adapter {name} is published under {registry}; published adapters: {published}")
    if not storage.is_remote(place) and Path(place).is_symlink():
        raise ConfigError(f"{place} is a symbolic link, and ftray does not delete its target; remove the link yourself")
    newest = list_published(registry).get(name)
    if newest is not None and not take_over:
        _check_owner(name, newest, owner, signer)
    storage.delete_tree(place)
    return number


def _tensors(uri: str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header. Raises ModelError if it is another kind of file."""
    length = header_length(storage.read_range(uri, 0, 8), uri)
    return read_header(storage.read_range(uri, 8, 8 + length), storage.size_and_etag(uri)[0] - 8 - length, uri)


def _directory_shapes(uri: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for info in storage.list_files(uri, suffix=".safetensors"):
        shapes |= {name: tensor.shape for name, tensor in _tensors(info.uri).items()}
    return shapes
