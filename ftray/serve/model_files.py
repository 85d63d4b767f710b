"""Finds the files of models and adapters, and the metadata of their runs.

Files are local, or committed in a bucket and downloaded into the cache once. The metadata is the lineage id and the
statistics of
the training data; missing metadata is left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftray import storage
from ftray.engine.adapters import CONFIG_FILE, WEIGHTS_FILE
from ftray.errors import CheckpointError, ModelError
from ftray.serve.registry_schema import LINEAGE, Reference, first_error
from ftray.storage import strict_json
from ftray.storage.model_directory import check_model_directory


def is_hub_id(uri: str) -> bool:
    """Whether `uri` is neither a local directory nor in a bucket: then it is a model of a hub."""
    return not (storage.is_remote(uri) or uri.startswith(("/", ".", "~")) or Path(uri).is_dir())


def check_model(uri: str) -> None:
    """Raises ModelError if the directory, local or in a bucket, is not a model. Downloads nothing and contacts no hub."""
    if is_hub_id(uri):
        return
    if not storage.is_remote(uri):
        check_model_directory(Path(uri))
    elif not storage.exists(storage.join(uri, "config.json")) or _committed(uri) is None:
        raise ModelError(
            f"{uri} is not a model: it has no config.json or was not committed; make one with `ftray export`"
        )


def local_model(uri: str) -> Path:
    """Local directory of a model. A model in a bucket is downloaded into the cache and verified. Raises as `check_model`."""
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


def local_adapter(uri: str, sums: Mapping[str, str] | None = None) -> Path:
    """Local directory of an adapter's two files.

    Args:
        uri: The adapter's directory. Committed files are verified; those in a bucket are stored in the cache.
        sums: Sha256 of each file, from a checked entry of the registry. Its files are always copied and the copy is verified,
            so
            nobody with write access to the registry can change them afterwards.

    Raises:
        ModelError: A file is missing, damaged or not a regular file.
        CheckpointError: The manifest is damaged.
        StorageError: The store cannot be read.
    """
    if sums is not None:
        return _verified_copy(uri, sums)
    manifest = storage.read_manifest(uri)
    if manifest is None and storage.is_remote(uri):
        raise ModelError(f"{uri} was not committed; publish it again")
    if manifest is None:
        return Path(uri)
    files = manifest.get("files")
    sums = {file: _sum_in(files, file) for file in (CONFIG_FILE, WEIGHTS_FILE)}
    if storage.is_remote(uri):
        return _verified_copy(uri, sums)
    for file, sum_ in sums.items():
        if _sha256(Path(uri) / file) != sum_:
            raise ModelError(f"{storage.join(uri, file)} is missing or damaged; publish it again")
    return Path(uri)


def _sum_in(files: Any, file: str) -> str:
    entry = files.get(file) if isinstance(files, dict) else None
    return str(entry.get("sha256")) if isinstance(entry, dict) else "missing"


def _verified_copy(uri: str, sums: Mapping[str, str]) -> Path:
    name = hashlib.sha256(f"{uri} {json.dumps(dict(sums), sort_keys=True)}".encode()).hexdigest()[:24]
    directory = storage.cache_directory() / "models" / name
    for file, sum_ in sums.items():
        if _sha256(directory / file) == sum_:
            continue
        source = storage.join(uri, file)
        if not storage.is_remote(uri) and not _is_plain_file(Path(source)):
            raise ModelError(f"{source} is missing, a symbolic link or no regular file; publish it again")
        try:
            storage.download_file(source, directory / file)
        except storage.MissingFile:
            raise ModelError(f"{source} is missing; publish it again") from None
        if _sha256(directory / file) != sum_:
            (directory / file).unlink(missing_ok=True)
            raise ModelError(f"{source} is damaged: its sha256 is not its manifest's; publish it again")
    return directory


def _is_plain_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _committed(uri: str) -> str | None:
    """The committed directory that is the model or contains it: `model/` of a run contains `merged/`."""
    parent = uri.rsplit("/", 1)[0]
    return next((u for u in (uri, parent) if storage.read_manifest(u) is not None), None)


MAX_REFERENCE_BYTES = 64 << 10

logger = logging.getLogger(__name__)


def lineages_of(models: Mapping[str, str]) -> dict[str, str]:
    """Lineage ids of exported models. models: id → URI."""
    found = {}
    for name, uri in models.items():
        try:
            manifest = storage.read_manifest(uri)
        except CheckpointError:  # reported when the model is loaded
            continue
        meta = {} if manifest is None else manifest.get("meta")
        lineage = meta.get("lineage") if isinstance(meta, dict) else None
        if isinstance(lineage, str) and re.fullmatch(LINEAGE, lineage):
            found[name] = lineage
    return found


def reference_of(run_dir: str) -> dict[str, Any]:
    """Statistics of a run's training data for drift detection; empty if they are missing or damaged."""
    uri = storage.join(run_dir, "data", "reference.json")  # data/prepare.py writes it
    if not storage.exists(uri):
        return {}
    try:
        tree = strict_json.parse(storage.read_range(uri, 0, MAX_REFERENCE_BYTES + 1), max_bytes=MAX_REFERENCE_BYTES)
        Reference.model_validate(tree)
    except ValidationError as err:
        logger.warning("%s is damaged, so drift is not reported: it %s", uri, first_error(err))
    except ValueError as err:
        logger.warning("%s is damaged, so drift is not reported: %s", uri, err)
    else:
        return dict(tree)
    return {}
