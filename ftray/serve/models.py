"""Where a replica finds its model: a local directory, or one committed in a bucket, fetched once into the cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ftray import storage
from ftray.engine.directory import check_model_directory
from ftray.errors import ModelError


def check_model(uri: str) -> None:
    """Raises ModelError if the directory, local or in a bucket, is no model. Downloads nothing."""
    if not storage.is_remote(uri):
        check_model_directory(Path(uri))
    elif not storage.exists(storage.join(uri, "config.json")) or _committed(uri) is None:
        raise ModelError(f"{uri} is no model: it has no config.json or was not committed; make one with `ftray export`")


def local_model(uri: str) -> Path:
    """Local directory of a model; one in a bucket is downloaded into the cache and verified. Raises as `check_model`."""
    check_model(uri)
    if not storage.is_remote(uri):
        return Path(uri)
    root = _committed(uri)
    assert root is not None
    manifest = json.dumps(storage.read_manifest(root), sort_keys=True)
    name = hashlib.sha256(f"{root} {manifest}".encode()).hexdigest()[:24]
    directory = storage.cache_directory() / "models" / name
    storage.fetch_directory(root, directory)
    return directory / uri.removeprefix(root).strip("/")


def _committed(uri: str) -> str | None:
    """The committed directory that the model is, or lies in: `model/` of a run holds `merged/`."""
    parent = uri.rsplit("/", 1)[0]
    return next((u for u in (uri, parent) if storage.read_manifest(u) is not None), None)
