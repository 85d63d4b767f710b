"""Which base it was: a hash for each of its files, where they are on this machine. Loads nothing, asks no hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ftray import config
from ftray.model.load import resolve_base

WHOLE_BYTES, END_BYTES = 1 << 26, 1 << 20  # larger files are known by their size and their two ends
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".gguf")


def base_files(model: config.Model) -> dict[str, str]:
    """Hash by file name of a base's directory, or of its snapshot in the hub's cache; {} where there is none.

    Raises ModelError as `resolve_base`.
    """
    directory = _directory(model)
    if directory is None:
        return {}
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name.endswith(SUFFIXES))
    return {path.name: _hash(path) for path in files}


def _directory(model: config.Model) -> Path | None:
    place = Path(resolve_base(model))
    if place.is_dir():
        return place
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(place), "config.json", revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def _hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(END_BYTES))
            file.seek(size - END_BYTES)
            digest.update(file.read())
    return digest.hexdigest()[:16]
