"""Where a replica finds its model and adapters: local directories, or committed in a bucket, fetched once into the cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ftray import storage
from ftray.engine.adapter import CONFIG_FILE, WEIGHTS_FILE
from ftray.engine.directory import check_model_directory
from ftray.errors import ModelError


def is_hub_id(uri: str) -> bool:
    """Whether `uri` is neither a local directory nor in a bucket: then it names a model of a hub."""
    return not (storage.is_remote(uri) or uri.startswith(("/", ".", "~")) or Path(uri).is_dir())


def check_model(uri: str) -> None:
    """Raises ModelError if the directory, local or in a bucket, is no model. Downloads nothing, asks no hub."""
    if is_hub_id(uri):
        return
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


def local_adapter(uri: str) -> Path:
    """Local directory of an adapter's two files; committed ones are verified, those in a bucket kept in the cache.

    Raises ModelError for files that are missing or damaged, CheckpointError for a damaged manifest, StorageError.
    """
    manifest = storage.read_manifest(uri)
    if manifest is None and storage.is_remote(uri):
        raise ModelError(f"{uri} was not committed; publish it again")
    directory = Path(uri)
    if storage.is_remote(uri):
        assert manifest is not None
        name = hashlib.sha256(f"{uri} {json.dumps(manifest, sort_keys=True)}".encode()).hexdigest()[:24]
        directory = storage.cache_directory() / "models" / name
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        sum_ = None if manifest is None else manifest["files"].get(file, {}).get("sha256", "missing")
        if storage.is_remote(uri) and _sha256(directory / file) != sum_:
            storage.download_file(storage.join(uri, file), directory / file)
        if sum_ is not None and _sha256(directory / file) != sum_:
            raise ModelError(f"{storage.join(uri, file)} is missing or damaged; publish it again")
    return directory


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _committed(uri: str) -> str | None:
    """The committed directory that the model is, or lies in: `model/` of a run holds `merged/`."""
    parent = uri.rsplit("/", 1)[0]
    return next((u for u in (uri, parent) if storage.read_manifest(u) is not None), None)
