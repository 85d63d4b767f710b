"""Which base it was: a hash for each of its files, where they are on this machine. Loads nothing, asks no hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ftray import config
from ftray.model.load import resolve_base

WHOLE_BYTES, END_BYTES = 1 << 26, 1 << 20  # larger files are known by their size and their two ends
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".gguf")


def base_files(model: config.ModelConfig) -> dict[str, str]:
    """Hash by file name of a base's directory; of a base from the hub its commit; {} where that is not known here.

    Workers download a hub's files when they need them, so that which of them are here says nothing.

    Raises ModelError as `resolve_base`.
    """
    directory = Path(resolve_base(model))
    if not directory.is_dir():
        return _commit(model)
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name.endswith(SUFFIXES))
    return {path.name: _hash(path) for path in files}


def _commit(model: config.ModelConfig) -> dict[str, str]:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    return {"commit": Path(found).parent.name} if isinstance(found, str) else {}


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
