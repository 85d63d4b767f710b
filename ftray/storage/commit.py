"""Committed directories: files first, the manifest last. So a directory is whole or does not exist, and damage shows.

Knows files; nothing of checkpoints, adapters or what else is kept this way.
"""

import hashlib
import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ftray.errors import CheckpointError
from ftray.storage import documents, files, local, transfer
from ftray.storage.address import MANIFEST, MissingFile, absolute, join


def commit_directory(local_dir: str | os.PathLike[str], uri: str, meta: dict[str, Any]) -> bool:
    """Copies a directory to `uri` and commits it: its files in parallel, then manifest.json, exclusively and last.

    The manifest is {"files": {path: {"size": bytes, "sha256": hex}}, "meta": meta, "sha256": of these two}. `local_dir`
    may be `uri` itself. Returns False if another writer committed first; keeping the files of two writers at
    one time apart is the lease's work. Raises CheckpointError for an empty directory, StorageError.
    """
    source = absolute(os.fspath(local_dir))
    if files.exists(join(uri, MANIFEST)):
        return False
    infos = files.list_files(source)
    if not infos or any(info.path == MANIFEST for info in infos):
        wrong = f"has a {MANIFEST} of its own; remove it" if infos else "holds no file"
        raise CheckpointError(f"{source} can't be committed to {uri}: it {wrong}")
    entries = transfer.in_parallel(lambda info: put_file(info.uri, uri, info.path), infos)
    return commit_files(uri, {info.path: entry for info, entry in zip(infos, entries, strict=True)}, meta)


def put_file(local_path: str, uri: str, path: str, sha256: str | None = None) -> dict[str, Any]:
    """Copies one file to `path` below a directory yet to be committed; returns its entry of the manifest.

    `local_path` may be that place already. sha256: of what was written, where the caller knows it. Raises StorageError.
    """
    if sha256 is None:
        size_bytes, sha256 = _size_and_sha256(local_path)
    else:
        size_bytes = files.size_and_etag(local_path)[0]
    if absolute(local_path) == absolute(join(uri, path)):
        local.sync(Path(local_path))
        local.sync(Path(local_path).parent)
    else:
        transfer.upload_file(local_path, join(uri, path))
    return {"size": size_bytes, "sha256": sha256}


def commit_files(uri: str, entries: dict[str, dict[str, Any]], meta: dict[str, Any]) -> bool:
    """Commits a directory whose files are there, perhaps by several hands: manifest.json, exclusively and last.

    entries: what `put_file` returned, by path. Returns False if another writer committed first. Raises CheckpointError
    for a file that is not there in its size, StorageError.
    """
    there = {info.path: info.size_bytes for info in files.list_files(uri)}
    for path, entry in entries.items():
        if there.get(path) != entry["size"]:
            raise CheckpointError(
                f"{join(uri, path)} has {there.get(path, 'no')} bytes instead of {entry['size']}, so {uri} is not "
                "committed; is this place the same for all workers?"
            )
    body = json.loads(json.dumps({"files": entries, "meta": meta}))
    text = json.dumps({**body, "sha256": _sum_of(body)}, indent=1)
    return files.create_bytes(join(uri, MANIFEST), text.encode())


def read_manifest(uri: str) -> dict[str, Any] | None:
    """{"files": …, "meta": …} of a committed directory, None if it was not committed.

    Raises CheckpointError for a manifest that is damaged, StorageError.
    """
    address = join(uri, MANIFEST)
    try:
        manifest = documents.parse_object(files.read_bytes(address))
    except MissingFile:
        return None
    except ValueError as error:
        raise CheckpointError(f"{address} is damaged ({error}); use the checkpoint before it") from None
    sum_ = manifest.pop("sha256", None)
    if sum_ != _sum_of(manifest):
        wrong = "its sha256 is another" if sum_ is not None else "it has no sha256"
        raise CheckpointError(f"{address} is damaged: {wrong}; use the checkpoint before it")
    entries, meta = manifest.get("files"), manifest.get("meta")
    if not isinstance(entries, dict) or not isinstance(meta, dict) or not all(map(_is_entry, entries.values())):
        raise CheckpointError(f"{address} is damaged: it lists no files; use the checkpoint before it")
    return manifest


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def verify_directory(uri: str) -> list[str]:
    """What is wrong with a committed directory, a sentence for each file; reads all of it. [] if it is sound.

    Raises StorageError.
    """
    try:
        manifest = read_manifest(uri)
    except CheckpointError as error:
        return [str(error)]
    if manifest is None:
        return [f"{join(uri, MANIFEST)} is missing: the directory was not committed"]
    wrongs = transfer.in_parallel(partial(_what_is_wrong, uri), sorted(manifest["files"].items()))
    return [wrong for wrong in wrongs if wrong]


def fetch_directory(uri: str, local_dir: str | os.PathLike[str]) -> None:
    """Copies the files of a committed directory to `local_dir` and verifies them; sound ones that are there are kept.

    Raises CheckpointError naming the file that is missing or damaged, StorageError.
    """
    manifest = read_manifest(uri)
    if manifest is None:
        raise CheckpointError(f"{uri} is not committed: it has no {MANIFEST}; use the checkpoint before it")
    target = absolute(os.fspath(local_dir))

    def fetch(item: tuple[str, dict[str, Any]]) -> None:
        path = item[0]
        if path.startswith("/") or ".." in path.split("/"):  # a published manifest may come from anybody
            raise CheckpointError(f"{join(uri, MANIFEST)} names '{path}', which is outside of its directory")
        if _what_is_wrong(target, item):
            with suppress(MissingFile):
                transfer.download_file(join(uri, path), join(target, path))
            if wrong := _what_is_wrong(target, item):
                files.delete(join(target, path))
                raise CheckpointError(f"{uri} is damaged: {wrong}; use the checkpoint before it")

    transfer.in_parallel(fetch, sorted(manifest["files"].items()))


def _what_is_wrong(uri: str, item: tuple[str, dict[str, Any]]) -> str:
    path, expected = item
    try:
        size_bytes = files.size_and_etag(join(uri, path))[0]
        if size_bytes != expected["size"]:
            return f"{path} has {size_bytes} bytes instead of {expected['size']}"
        return "" if _size_and_sha256(join(uri, path))[1] == expected["sha256"] else f"{path} has another sha256"
    except MissingFile:
        return f"{path} is missing"


def _size_and_sha256(uri: str) -> tuple[int, str]:
    size_bytes, _ = files.size_and_etag(uri)
    digest = hashlib.sha256()
    for start in range(0, size_bytes, transfer.PART_BYTES):
        digest.update(files.read_range(uri, start, min(start + transfer.PART_BYTES, size_bytes)))
    return size_bytes, digest.hexdigest()


def _sum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
