"""Whole files from here to there, large ones in parts and several at a time. Knows no directory."""

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar

from ftray.errors import StorageError
from ftray.storage import files, local, s3
from ftray.storage.address import absolute, is_remote

PART_BYTES = 16 << 20
NUM_THREADS = 4  # files at a time, and parts of one file at a time: at most 4 × 4 parts are in memory
Item = TypeVar("Item")
Result = TypeVar("Result")


def upload_file(local_path: str | os.PathLike[str], uri: str) -> None:
    """Copies a local file to `uri`, which appears at once and whole. Raises MissingFile, StorageError."""
    with local.guarded(os.fspath(local_path), "read") as source:
        size_bytes = source.stat().st_size
    if not is_remote(uri):
        with local.guarded(uri, "written") as path, local.staged(path) as staged:
            shutil.copyfile(source, staged)
            local.replace(staged, path)
    elif size_bytes <= PART_BYTES:
        files.write_bytes(uri, files.read_bytes(str(source)))
    else:
        _upload_parts(str(source), uri, size_bytes)


def _upload_parts(source: str, uri: str, size_bytes: int) -> None:
    part_bytes = max(PART_BYTES, -(-size_bytes // 10_000))  # S3 takes at most 10,000 parts
    upload = {"UploadId": s3.request("create_multipart_upload", uri)["UploadId"]}

    def send(number: int) -> dict[str, Any]:
        data = files.read_range(source, (number - 1) * part_bytes, number * part_bytes)
        return {
            "PartNumber": number,
            "ETag": s3.request("upload_part", uri, PartNumber=number, Body=data, **upload)["ETag"],
        }

    try:
        parts = {"Parts": in_parallel(send, range(1, -(-size_bytes // part_bytes) + 1))}
        done = s3.request("complete_multipart_upload", uri, unless=("NoSuchUpload",), MultipartUpload=parts, **upload)
        # A completion whose answer was lost is sent again, and its upload no longer exists.
        if done is None and files.size_and_etag(uri)[0] != size_bytes:
            raise StorageError(f"{uri}: its upload was ended by somebody else; try again")
    except BaseException:
        with suppress(StorageError):
            s3.request("abort_multipart_upload", uri, unless=("NoSuchUpload",), **upload)
        raise


def download_file(uri: str, local_path: str | os.PathLike[str]) -> None:
    """Copies `uri` to a local file, which appears at once and whole. Raises MissingFile, StorageError."""
    if not is_remote(uri):
        upload_file(absolute(uri), os.fspath(local_path))
        return
    head = s3.request("head_object", uri)
    target = local.guarded(os.fspath(local_path), "written")
    with target as path, local.staged(path) as staged, staged.open("wb") as file:

        def fetch(start: int) -> None:
            data = s3.read_range(uri, start, start + PART_BYTES, IfMatch=head["ETag"])
            os.pwrite(file.fileno(), data, start)

        in_parallel(fetch, range(0, head["ContentLength"], PART_BYTES))
        local.replace(staged, path)


def map_file(uri: str) -> mmap.mmap:
    """A whole file, not empty, mapped for reading: its pages take no memory that others need. A remote one is copied first,
    to a temporary file that goes with the mapping. Raises MissingFile, StorageError."""
    if not is_remote(uri):
        with local.guarded(uri, "read") as path, path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with tempfile.TemporaryDirectory(prefix="ftray-") as directory:
        copy = Path(directory, "copy")
        download_file(uri, copy)
        return map_file(str(copy))


def in_parallel(action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `action` returns for each item, in their order; the first error ends it."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="ftray-storage") as pool:
        contexts = [(copy_context(), item) for item in items]  # the caller's patience holds in its threads too
        return list(pool.map(lambda pair: pair[0].run(action, pair[1]), contexts))
