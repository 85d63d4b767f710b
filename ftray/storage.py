"""One way to files, local or s3://: retries, atomic writes, committed directories, and the lease that names an owner.

Does not know what the files hold, nor any room but errors. fsspec and s3fs are imported at the first s3:// address.

S3 is spoken through s3fs's client, one request at a time (`_request`), and never through s3fs's file methods: those
cache listings, and retry with limits of their own. So there is one deadline, and one place that tells a passing trouble
from a refusal. Keys, endpoint and region come from where AWS's own tools take them: AWS_ENDPOINT_URL_S3, AWS_PROFILE.
"""

import errno
import getpass
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from ftray.errors import CheckpointError, RunHeldError, StorageError

log = logging.getLogger(__name__)

RETRY_S = 60.0  # how long passing S3 troubles are retried; FTRAY_STORAGE_RETRY_S overrides it
MANIFEST = "manifest.json"
_PART_BYTES = 16 << 20
_NUM_THREADS = 4  # files at a time, and parts of one file at a time: at most 4 × 4 parts are in memory
_TEMP_SUFFIX = ".ftray-tmp"
_NUM_LEASE_FILES = 3
_retry_s: ContextVar[float | None] = ContextVar("retry_s", default=None)  # a shorter deadline for one caller
# Not the global generator: training seeds that one, and a retry must not change what it draws.
_jitter = random.Random()
Item = TypeVar("Item")
Result = TypeVar("Result")


class MissingFile(StorageError):
    """A file that is read does not exist."""


@dataclass(frozen=True)
class FileInfo:
    """One file of a listing: where it is, where it is relative to what was listed, and what changes when it changes."""

    uri: str
    path: str
    size_bytes: int
    etag: str


# Addresses


def is_remote(uri: str) -> bool:
    """True for s3://, False for a local path."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """The one spelling of an address: local paths absolute (`~`, file:// resolved), s3:// without a slash at its end.

    Raises StorageError for another scheme or an s3:// address without bucket.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return os.path.abspath(Path(uri).expanduser())  # noqa: PTH100 - Path.absolute() keeps `..`
    if scheme == "s3" and rest.strip("/"):
        return f"s3://{rest.strip('/')}"
    if scheme == "file" and rest.removeprefix("localhost").startswith("/"):
        return os.path.abspath(unquote(rest.removeprefix("localhost")))  # noqa: PTH100
    raise StorageError(f"{uri} is not an address that can be used; give a local path, file:///path or s3://bucket/path")


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts below it, one slash between them."""
    below = [part.strip("/") for part in parts if part.strip("/")]
    return "/".join([uri.rstrip("/"), *below]) if below else uri


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = absolute(uri).removeprefix("s3://").partition("/")
    return bucket, key


# Local files: every OSError becomes a sentence

_LOCAL_REASONS = {
    errno.EACCES: "there is no permission; change its owner or mode, or choose another place",
    errno.EDQUOT: "the quota is used up; free some space, or choose another place",
    errno.EEXIST: "a part of the path is a file and not a directory; choose another place",
    errno.EISDIR: "it is a directory and not a file",
    errno.ENOENT: "nothing can be made here; choose another place",
    errno.ENOSPC: "no space is left on the device; free some, or choose another place",
    errno.ENOTDIR: "a part of the path is a file and not a directory; choose another place",
    errno.ENOTSUP: "the file system has no hard links, which exclusive creation needs; choose another place",
    errno.EPERM: "the operation is not permitted here; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
}


@contextmanager
def _local(uri: str, done: str) -> Iterator[Path]:
    """The local path of `uri`; `done` is "read", "written" or "deleted". Raises StorageError for any OSError inside."""
    path = Path(absolute(uri))
    try:
        yield path
    except OSError as error:
        if isinstance(error, FileNotFoundError) and done == "read":
            raise MissingFile(f"{error.filename or path} does not exist; check the path") from error
        reason = _LOCAL_REASONS.get(error.errno or 0) or os.strerror(error.errno or errno.EIO)
        raise StorageError(f"{path} can't be {done}: {reason}") from error


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to fill and move; its directory is made, and what was not moved is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / f".{uuid4().hex}{_TEMP_SUFFIX}"
    try:
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Forces a file or a directory's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems can't sync a directory
            raise
    finally:
        os.close(handle)


def _replace(staged: Path, path: Path) -> None:
    _sync(staged)
    staged.replace(path)
    _sync(path.parent)


def _local_etag(status: os.stat_result) -> str:
    return hashlib.blake2b(f"{status.st_size} {status.st_mtime_ns}".encode(), digest_size=16).hexdigest()


def _walk(
    root: Path, depth: float, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[Path, os.stat_result]]:
    """The regular files at most `depth` directories below `root`; follows links, but not back up."""
    here = root.stat()
    above |= {(here.st_dev, here.st_ino)}
    for entry in os.scandir(root):
        try:
            status = entry.stat()
        except FileNotFoundError:
            if entry.is_symlink():  # a link to nowhere is the user's mistake; a file that just went away is not
                raise
            continue
        if stat.S_ISDIR(status.st_mode) and depth > 0 and (status.st_dev, status.st_ino) not in above:
            yield from _walk(Path(entry.path), depth - 1, above)
        elif stat.S_ISREG(status.st_mode) and not entry.name.endswith(_TEMP_SUFFIX):
            yield Path(entry.path), status


# S3: one request at a time

_S3_REASONS = {
    "AccessDenied": "{endpoint} denies access to {uri}; check the keys (AWS_ACCESS_KEY_ID, AWS_PROFILE), and that they "
    "may list, read, write and delete in bucket '{bucket}'",
    "ExpiredToken": "the session token used for {uri} has expired or is not valid; log in again (AWS_SESSION_TOKEN)",
    "InvalidAccessKeyId": "{endpoint} does not know the access key id used for {uri}; correct AWS_ACCESS_KEY_ID",
    "InvalidBucketName": "'{bucket}' is not a valid bucket name; correct the address {uri}",
    "NoCredentialsError": "{uri} needs S3 keys, and there are none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "NoSuchBucket": "bucket '{bucket}' does not exist at {endpoint}; create it, or correct the address {uri}",
    "NotImplemented": "{endpoint} can't do what {uri} needs; use a store with conditional writes (If-None-Match)",
    "PermanentRedirect": "bucket '{bucket}' is in another region than the one that was asked; set AWS_REGION",
    "PreconditionFailed": "{uri} changed while it was read; try again",
    "RequestTimeTooSkewed": "the clock of this machine is off, so {endpoint} refuses {uri}; set the clock",
    "SignatureDoesNotMatch": "{endpoint} refuses the signature for {uri}; correct AWS_SECRET_ACCESS_KEY",
}
_S3_SAME = {
    "301": "PermanentRedirect",
    "403": "AccessDenied",
    "412": "PreconditionFailed",
    "AuthorizationHeaderMalformed": "PermanentRedirect",
    "InvalidToken": "ExpiredToken",
    "PartialCredentialsError": "NoCredentialsError",
}
# 4xx that pass all the same; 429 and 5xx always do, except 501.
_S3_PASSING = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
}
_S3_MISSING = ("404", "NoSuchKey")

_connecting: dict[int, threading.Lock] = {}  # by pid: a forked child must not wait for a lock of its parent


def _filesystem() -> Any:
    """s3fs's filesystem for this process and these AWS settings; fsspec's own would differ by thread."""
    pid = os.getpid()
    with _connecting.setdefault(pid, threading.Lock()):
        return _connect(pid, tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@lru_cache(maxsize=4)
def _connect(_pid: int, _settings: tuple[tuple[str, str], ...]) -> Any:
    import s3fs

    # One attempt here: `_request` retries. 64 connections: all threads of a commit and of a few readers beside it.
    config = {
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 64,
        "connect_timeout": 5,
        "read_timeout": 30,
    }
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    filesystem.connect()
    return filesystem


async def _send(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
    response = await getattr(client, operation)(**arguments)
    if "Body" in response:
        async with response["Body"] as body:
            response["Body"] = await body.read()
    return response


def _request(operation: str, uri: str, unless: tuple[str, ...] = (), **arguments: Any) -> Any:
    """The answer to one S3 request about `uri`, its Body read; None if the store refuses with a code in `unless`.

    Passing troubles (5xx, SlowDown, resets, timeouts, cut answers) are retried with exponential backoff and jitter
    until the deadline of RETRY_S. Raises MissingFile, and StorageError with the remedy.
    """
    from fsspec.asyn import sync

    bucket, key = _bucket_and_key(uri)
    arguments = {"Bucket": bucket, **({"Key": key} if key else {}), **arguments}
    budget_s = _retry_s.get() or float(os.environ.get("FTRAY_STORAGE_RETRY_S", RETRY_S))
    deadline = time.monotonic() + budget_s
    pause_s = 0.1
    while True:
        try:
            filesystem = _filesystem()
            return sync(filesystem.loop, _send, filesystem.s3, operation, arguments)
        except Exception as error:
            code = _refusal(error)[0]
            if code in unless:
                return None
            if not _is_passing(error):
                raise _explained(uri, error) from error
            if time.monotonic() + pause_s > deadline:
                failed = "can't be reached" if "Connect" in code else "gave no good answer"
                raise StorageError(
                    f"{_endpoint()} {failed} for {uri} within {budget_s:.3g} s (last: {code}); check "
                    "AWS_ENDPOINT_URL_S3 and the network, or try longer with FTRAY_STORAGE_RETRY_S"
                ) from error
        time.sleep(pause_s * _jitter.uniform(0.5, 1))
        pause_s = min(2 * pause_s, 8.0)


def _refusal(error: Exception) -> tuple[str, int]:
    """The store's code and HTTP status; the name of the exception and 0 where the store said nothing."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return type(error).__name__, 0
    return str(response["Error"].get("Code")), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _is_passing(error: Exception) -> bool:
    from aiohttp import ClientError as ConnectionTrouble
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    if isinstance(error, boto.ClientError):
        code, status = _refusal(error)
        return code in _S3_PASSING or status == 429 or (status >= 500 and status != 501)
    passing = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError)
    others = (ConnectionTrouble, ResponseParserError, TimeoutError, ConnectionError)
    return isinstance(error, passing + others) and not isinstance(error, boto.SSLError)


def _endpoint() -> str:
    """The store's address, without a user or password that may stand in it."""
    parts = urlsplit(_filesystem().s3.meta.endpoint_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _explained(uri: str, error: Exception) -> StorageError:
    code, status = _refusal(error)
    bucket = _bucket_and_key(uri)[0]
    if code in _S3_MISSING:
        return MissingFile(f"{uri} does not exist; check the address")
    if reason := _S3_REASONS.get(_S3_SAME.get(code, code)):
        return StorageError(
            reason.format(uri=uri, bucket=bucket, endpoint=_endpoint() if "{endpoint}" in reason else "")
        )
    if status:  # the store's own text may repeat parts of the request
        return StorageError(f"{_endpoint()} refuses {uri} with {code} (HTTP {status}); check the address and the keys")
    said = re.sub(r"//[^/@\s]*@", "//", str(error)).partition("\n")[0]
    return StorageError(f"{uri} can't be reached: {said} ({code}); check the AWS_ settings")


# Reading


def read_bytes(uri: str) -> bytes:
    """A whole file. Raises MissingFile, StorageError."""
    if is_remote(uri):
        return bytes(_request("get_object", uri)["Body"])
    with _local(uri, "read") as path:
        return path.read_bytes()


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, clipped at its end. Raises MissingFile, StorageError."""
    return _read_range(uri, start, end)


def _read_range(uri: str, start: int, end: int, **condition: str) -> bytes:
    if is_remote(uri):
        # An empty range can't be asked for: ask for one byte, which tells a missing file, and drop it.
        asked = f"bytes={start}-{max(start, end - 1)}"
        response = _request("get_object", uri, unless=("InvalidRange", "416"), Range=asked, **condition)
        return bytes(response["Body"])[: max(0, end - start)] if response else b""
    with _local(uri, "read") as path, path.open("rb") as file:
        file.seek(start)
        return file.read(max(0, end - start))


def size_and_etag(uri: str) -> tuple[int, str]:
    """Size in bytes, and a string that differs when the content does (locally: when size or mtime do).

    Raises MissingFile, StorageError.
    """
    if is_remote(uri):
        head = _request("head_object", uri)
        return head["ContentLength"], _s3_etag(head["ETag"], head["ContentLength"])
    with _local(uri, "read") as path:
        status = path.stat()
        return status.st_size, _local_etag(status)


def _s3_etag(etag: str, size_bytes: int) -> str:
    return f"{etag.strip(chr(34))}-{size_bytes}"


def exists(uri: str) -> bool:
    """True for a file or a directory (on S3: something below it). Raises StorageError if that can't be known."""
    if not is_remote(uri):
        with _local(uri, "read") as path:
            return path.exists()
    bucket, key = _bucket_and_key(uri)
    if key and _request("head_object", uri, unless=_S3_MISSING):
        return True
    below = _request("list_objects_v2", f"s3://{bucket}", MaxKeys=1, Prefix=f"{key}/" if key else "")
    return not key or bool(below.get("Contents"))


def list_files(prefix_uri: str, suffix: str = "") -> list[FileInfo]:
    """The files below a directory, sorted by their path relative to it; a file lists itself; nothing there: [].

    Raises StorageError.
    """
    root = absolute(prefix_uri)
    return [info for info in (_list_s3(root) if is_remote(root) else _list_local(root)) if info.path.endswith(suffix)]


def glob_files(pattern: str) -> list[FileInfo]:
    """The files that match a pattern of `*`, `?`, `[…]` and `**`, sorted; without any, those of a directory or file.

    FileInfo.path is relative to the last directory before the first wildcard. Raises StorageError.
    """
    pattern = absolute(pattern)
    parts = pattern.split("/")
    first = next((number for number, part in enumerate(parts) if re.search(r"[*?[]", part)), None)
    if is_remote(pattern) and first == 2:
        raise StorageError(f"{pattern} has a wildcard in its bucket; name the bucket")
    if first is None or exists(pattern):  # a name may hold brackets
        return list_files(pattern)
    root, rest = "/".join(parts[:first]) or "/", "/".join(parts[first:])
    from fsspec.utils import glob_translate

    try:
        matches = re.compile(glob_translate(rest)).match
    except ValueError as error:
        raise StorageError(f"{pattern} is not a pattern: `**` must stand alone between two slashes") from error
    if is_remote(root):
        found = _list_s3(root, re.split(r"[*?[]", rest)[0])
    else:
        found = _list_local(root, math.inf if "**" in parts else rest.count("/"))
    return [info for info in found if matches(info.path)]


def _list_local(root: str, depth: float = math.inf) -> list[FileInfo]:
    with _local(root, "read") as path:
        if not path.exists():
            return []
        top = path if path.is_dir() else path.parent
        files = _walk(path, depth) if path.is_dir() else [(path, path.stat())]
        infos = [FileInfo(str(p), p.relative_to(top).as_posix(), s.st_size, _local_etag(s)) for p, s in files]
    return sorted(infos, key=lambda info: info.path)


def _list_s3(root: str, start: str = "") -> list[FileInfo]:
    bucket, key = _bucket_and_key(root)
    top = f"{key}/" if key else ""
    infos = []
    for found in _pages(bucket, top + start):
        if not found["Key"].endswith("/"):  # a console's marker for an empty directory
            etag = _s3_etag(found["ETag"], found["Size"])
            infos.append(FileInfo(f"s3://{bucket}/{found['Key']}", found["Key"].removeprefix(top), found["Size"], etag))
    if not infos and key and not start and (head := _request("head_object", root, unless=_S3_MISSING)):
        size_bytes = head["ContentLength"]
        return [FileInfo(root, key.rpartition("/")[2], size_bytes, _s3_etag(head["ETag"], size_bytes))]
    return sorted(infos, key=lambda info: info.path)


def _pages(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    more: dict[str, Any] = {}
    while True:
        page = _request("list_objects_v2", f"s3://{bucket}", Prefix=prefix, **more)
        yield from page.get("Contents", [])
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


# Writing


def write_bytes(uri: str, data: bytes) -> None:
    """Writes or replaces a file; a reader sees the old content or the new, never a part. Raises StorageError."""
    if is_remote(uri):
        _request("put_object", uri, Body=data)
        return
    with _local(uri, "written") as path, _staged(path) as staged:
        staged.write_bytes(data)
        _replace(staged, path)


def create_bytes(uri: str, data: bytes) -> bool:
    """Writes a file only if there is none: of any number of writers one gets True. Raises StorageError."""
    if is_remote(uri):
        # A put whose answer was lost is sent again and finds its own object: the mark tells that from another's.
        mark = {"ftray-writer": uuid4().hex}
        if _request("put_object", uri, ("PreconditionFailed", "412"), Body=data, IfNoneMatch="*", Metadata=mark):
            return True
        there = _request("head_object", uri, unless=_S3_MISSING)
        return bool(there) and there.get("Metadata") == mark
    with _local(uri, "written") as path, _staged(path) as staged:
        staged.write_bytes(data)
        _sync(staged)
        try:
            path.hardlink_to(staged)
        except FileExistsError:
            return path.exists() and path.samefile(staged)  # NFS may repeat a call that had succeeded
        _sync(path.parent)
        return True


def upload_file(local_path: str | os.PathLike[str], uri: str) -> None:
    """Copies a local file to `uri`, which appears at once and whole. Raises MissingFile, StorageError."""
    with _local(os.fspath(local_path), "read") as source:
        size_bytes = source.stat().st_size
    if not is_remote(uri):
        with _local(uri, "written") as path, _staged(path) as staged:
            shutil.copyfile(source, staged)
            _replace(staged, path)
    elif size_bytes <= _PART_BYTES:
        write_bytes(uri, read_bytes(str(source)))
    else:
        _upload_parts(str(source), uri, size_bytes)


def _upload_parts(source: str, uri: str, size_bytes: int) -> None:
    part_bytes = max(_PART_BYTES, -(-size_bytes // 10_000))  # S3 takes at most 10,000 parts
    upload = {"UploadId": _request("create_multipart_upload", uri)["UploadId"]}

    def send(number: int) -> dict[str, Any]:
        data = read_range(source, (number - 1) * part_bytes, number * part_bytes)
        return {
            "PartNumber": number,
            "ETag": _request("upload_part", uri, PartNumber=number, Body=data, **upload)["ETag"],
        }

    try:
        parts = {"Parts": _in_parallel(send, range(1, -(-size_bytes // part_bytes) + 1))}
        done = _request("complete_multipart_upload", uri, unless=("NoSuchUpload",), MultipartUpload=parts, **upload)
        # A completion whose answer was lost is sent again, and its upload is no more.
        if done is None and size_and_etag(uri)[0] != size_bytes:
            raise StorageError(f"{uri}: its upload was ended by somebody else; try again")
    except BaseException:
        with suppress(StorageError):
            _request("abort_multipart_upload", uri, unless=("NoSuchUpload",), **upload)
        raise


def download_file(uri: str, local_path: str | os.PathLike[str]) -> None:
    """Copies `uri` to a local file, which appears at once and whole. Raises MissingFile, StorageError."""
    if not is_remote(uri):
        upload_file(absolute(uri), os.fspath(local_path))
        return
    head = _request("head_object", uri)
    with _local(os.fspath(local_path), "written") as path, _staged(path) as staged, staged.open("wb") as file:

        def fetch(start: int) -> None:
            data = _read_range(uri, start, start + _PART_BYTES, IfMatch=head["ETag"])
            os.pwrite(file.fileno(), data, start)

        _in_parallel(fetch, range(0, head["ContentLength"], _PART_BYTES))
        _replace(staged, path)


def delete(uri: str) -> None:
    """Deletes a file; a missing one is fine. Raises StorageError."""
    if is_remote(uri):
        _request("delete_object", uri, unless=_S3_MISSING)
        return
    with _local(uri, "deleted") as path:
        path.unlink(missing_ok=True)


def delete_tree(uri: str) -> None:
    """Deletes all below a directory, manifests first, so that a half-deleted checkpoint is not a committed one.

    A missing one is fine. Raises StorageError, also for a whole bucket or the root directory.
    """
    uri = absolute(uri)
    if uri == "/" or (is_remote(uri) and not _bucket_and_key(uri)[1]):
        raise StorageError(f"{uri} is all there is; name a directory below it to delete")
    if not is_remote(uri):
        with _local(uri, "deleted") as path:
            for manifest in path.rglob(MANIFEST):
                manifest.unlink()
            if path.exists():
                shutil.rmtree(path)
        return
    bucket, key = _bucket_and_key(uri)
    keys = sorted((found["Key"] for found in _pages(bucket, f"{key}/")), key=lambda k: not k.endswith(f"/{MANIFEST}"))
    for start in range(0, len(keys), 1000):
        objects = [{"Key": k} for k in keys[start : start + 1000]]
        done = _request("delete_objects", f"s3://{bucket}", Delete={"Objects": objects, "Quiet": True})
        for failed in done.get("Errors", []):
            raise StorageError(f"s3://{bucket}/{failed['Key']} can't be deleted: {failed.get('Code')}; check the keys")


def check_writable(uri: str) -> None:
    """Creates and deletes a small file at `uri`. Raises StorageError with the one thing that stands in the way."""
    place = absolute(uri)
    if not is_remote(place):
        with _local(place, "written") as path:  # in what is already there: a mistyped path makes no directory
            place = str(next(p for p in (path, *path.parents) if p.exists()))
    probe = f"/.ftray-probe-{uuid4().hex}"
    before = _retry_s.set(min(10.0, _retry_s.get() or 10.0))  # somebody waits for the answer
    try:
        created = [create_bytes(place + probe, b"ftray") for _ in range(2)]
        delete(place + probe)
    except StorageError as error:
        raise StorageError(str(error).replace(probe, "")) from error
    finally:
        _retry_s.reset(before)
    if created != [True, False]:
        raise StorageError(f"{uri} lacks exclusive creation, so two runs could overwrite each other; use another store")


def _in_parallel(action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ftray-storage") as pool:
        return list(pool.map(action, items))


# Committed directories: files first, the manifest last


def commit_directory(local_dir: str | os.PathLike[str], uri: str, meta: dict[str, Any]) -> bool:
    """Copies a directory to `uri` and commits it: its files in parallel, then manifest.json, exclusively and last.

    The manifest is {"files": {path: {"size": bytes, "sha256": hex}}, "meta": meta, "sha256": of these two}. `local_dir`
    may be `uri` itself. Returns False if another writer committed first; keeping the files of two writers at
    one time apart is the lease's work. Raises CheckpointError for an empty directory, StorageError.
    """
    source = absolute(os.fspath(local_dir))
    if exists(join(uri, MANIFEST)):
        return False
    infos = list_files(source)
    if not infos or any(info.path == MANIFEST for info in infos):
        wrong = f"has a {MANIFEST} of its own; remove it" if infos else "holds no file"
        raise CheckpointError(f"{source} can't be committed to {uri}: it {wrong}")

    def put(info: FileInfo) -> tuple[str, dict[str, Any]]:
        size_bytes, sha256 = _size_and_sha256(info.uri)
        if source == absolute(uri):
            _sync(Path(info.uri))
            _sync(Path(info.uri).parent)
        else:
            upload_file(info.uri, join(uri, info.path))
        return info.path, {"size": size_bytes, "sha256": sha256}

    body = json.loads(json.dumps({"files": dict(_in_parallel(put, infos)), "meta": meta}))
    text = json.dumps({**body, "sha256": _sum_of(body)}, indent=1)
    return create_bytes(join(uri, MANIFEST), text.encode())


def read_manifest(uri: str) -> dict[str, Any] | None:
    """{"files": …, "meta": …} of a committed directory, None if it was not committed.

    Raises CheckpointError for a manifest that is damaged, StorageError.
    """
    address = join(uri, MANIFEST)
    try:
        manifest = json.loads(read_bytes(address))
        if manifest.pop("sha256") == _sum_of(manifest):
            return dict(manifest)
    except MissingFile:
        return None
    except (AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{address} is damaged; use the checkpoint before it") from error
    raise CheckpointError(f"{address} is damaged: its sha256 is another; use the checkpoint before it")


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
    return [wrong for wrong in _in_parallel(partial(_what_is_wrong, uri), sorted(manifest["files"].items())) if wrong]


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
                download_file(join(uri, path), join(target, path))
            if wrong := _what_is_wrong(target, item):
                delete(join(target, path))
                raise CheckpointError(f"{uri} is damaged: {wrong}; use the checkpoint before it")

    _in_parallel(fetch, sorted(manifest["files"].items()))


def _what_is_wrong(uri: str, item: tuple[str, dict[str, Any]]) -> str:
    path, expected = item
    try:
        size_bytes = size_and_etag(join(uri, path))[0]
        if size_bytes != expected["size"]:
            return f"{path} has {size_bytes} bytes instead of {expected['size']}"
        return "" if _size_and_sha256(join(uri, path))[1] == expected["sha256"] else f"{path} has another sha256"
    except MissingFile:
        return f"{path} is missing"


def _size_and_sha256(uri: str) -> tuple[int, str]:
    size_bytes, _ = size_and_etag(uri)
    digest = hashlib.sha256()
    for start in range(0, size_bytes, _PART_BYTES):
        digest.update(read_range(uri, start, min(start + _PART_BYTES, size_bytes)))
    return size_bytes, digest.hexdigest()


def _sum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# The lease: who owns a run


class Lease:
    """The right to write a run, kept by a thread that rewrites its file every ttl/6; made by `acquire_lease`.

    Leaving the `with` block releases it. A process that dies leaves it to grow stale.
    """

    def __init__(self, folder: str, number: int, record: dict[str, Any], began_s: float) -> None:
        self._folder, self._number, self._record = folder, number, record
        self._ttl_s: float = record["ttl_s"]
        self._last_sign_s = began_s
        self._overtaken = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ftray-lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """True if another process took the run, or may have: no sign of life reached the store for `ttl_s`."""
        return self._overtaken or time.monotonic() - self._last_sign_s > self._ttl_s

    def release(self) -> None:
        """Lets the next one take the run at once. A store that can't be reached only delays that, by `ttl_s`."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(self._ttl_s)
        self._record["released"] = True
        self._sign()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._overtaken and not self._stop.wait(self._ttl_s / 6):
            self._sign()

    def _sign(self) -> None:
        before = _retry_s.set(self._ttl_s / 3)
        began_s = time.monotonic()  # before the write: another reads the age of the write itself
        try:
            self._overtaken = max(_lease_numbers(self._folder), default=0) != self._number
            if not self._overtaken:
                write_bytes(_lease_uri(self._folder, self._number), json.dumps(self._record).encode())
                self._last_sign_s = began_s
        except StorageError as error:
            log.warning("the lease of the run could not be renewed: %s", error)
        finally:
            _retry_s.reset(before)


def acquire_lease(run_uri: str, ttl_s: float = 60.0, owner: dict[str, Any] | None = None) -> Lease:
    """Takes the run, also from an owner that released it, died on this machine, or gave no sign of life for its ttl_s.

    `owner`: more about this process, kept in the lease. Raises RunHeldError naming the live owner, StorageError.
    """
    folder = join(absolute(run_uri), "lease")
    for _ in range(10):
        last = max(_lease_numbers(folder), default=0)
        if last and (held := _live_owner(_lease_uri(folder, last))):
            raise RunHeldError(f"run '{run_uri.rstrip('/').rpartition('/')[2]}' {held}; wait for it, or stop it there")
        record, began_s = {**(owner or {}), **_this_process(), "ttl_s": ttl_s}, time.monotonic()
        mine = _lease_uri(folder, last + 1)
        if not create_bytes(mine, json.dumps(record).encode()):
            continue  # another was quicker: it is the owner now
        numbers = _lease_numbers(folder)
        if max(numbers) == last + 1:
            for number in numbers[:-_NUM_LEASE_FILES]:
                delete(_lease_uri(folder, number))
            return Lease(folder, last + 1, record, began_s)
        delete(mine)  # this process slept so long that later owners had come, and cleared the number it took
    raise RunHeldError(f"{run_uri} changes hands too fast to be taken; try again")


def _lease_uri(folder: str, number: int) -> str:
    return join(folder, f"{number:06d}.json")


def _lease_numbers(folder: str) -> list[int]:
    stems = [info.path.removesuffix(".json") for info in list_files(folder, ".json")]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _live_owner(uri: str) -> str:
    """Who holds a lease file, in words; "" if nobody does: released, grown stale, or its process is dead."""
    try:
        data, age_s = _read_with_age(uri)
        record = json.loads(data)
    except (MissingFile, ValueError):
        return ""
    here = _this_process()
    dead = record["machine"] == here["machine"] and _process_start(record["pid"]) != record["process_start"]
    if record["released"] or age_s > record["ttl_s"] or (dead and here["machine"]):
        return ""
    since = datetime.fromisoformat(record["since"])
    return (
        f"is held by {record['user']} on {record['host']} (pid {record['pid']}, since {since:%Y-%m-%d %H:%M} UTC, "
        f"last sign of life {age_s:.0f} s ago)"
    )


def _read_with_age(uri: str) -> tuple[bytes, float]:
    """Content, and seconds since it was written by the store's own clock: those of two machines may differ."""
    if is_remote(uri):
        response = _request("get_object", uri)
        now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
        return response["Body"], max(0.0, (now - response["LastModified"]).total_seconds())
    with _local(uri, "read") as path, _staged(path) as probe:
        probe.touch()
        return path.read_bytes(), max(0.0, probe.stat().st_mtime - path.stat().st_mtime)


def _this_process() -> dict[str, Any]:
    host, machine = socket.gethostname(), ""
    # Containers of one host share its name and boot, but a pid means a process only within its own namespace.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{host} {boot} {Path('/proc/self/ns/pid').readlink()}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid {os.getuid()}"
    since = datetime.now(UTC).isoformat(timespec="seconds")
    process = {"pid": os.getpid(), "process_start": _process_start(os.getpid()), "machine": machine}
    return {"host": host, "user": user, "since": since, "released": False, **process}


def _process_start(pid: int) -> str:
    """When a process began, in clock ticks since boot; "" if it is dead. A pid is used again, a pair of both is not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def cache_directory() -> Path:
    """Local directory for what can be made again: $FTRAY_CACHE, else $XDG_CACHE_HOME/ftray, else ~/.cache/ftray."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FTRAY_CACHE") or f"{base}/ftray").expanduser()
