"""Single files, local or s3:// alike: read, list, write, create, delete. Copies nothing between the two."""

import math
import re
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from uuid import uuid4

from ftray.errors import StorageError
from ftray.storage import local, s3
from ftray.storage.address import MANIFEST, MARK, FileInfo, absolute, bucket_and_key, is_remote


def read_bytes(uri: str) -> bytes:
    """A whole file. Raises MissingFile, StorageError."""
    if is_remote(uri):
        return bytes(s3.request("get_object", uri)["Body"])
    with local.guarded(uri, "read") as path:
        return path.read_bytes()


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, clipped at its end. Raises MissingFile, StorageError."""
    if is_remote(uri):
        return s3.read_range(uri, start, end)
    with local.guarded(uri, "read") as path, path.open("rb") as file:
        file.seek(start)
        return file.read(max(0, end - start))


def size_and_etag(uri: str) -> tuple[int, str]:
    """Size in bytes, and a string that differs when the content does (locally: when size or mtime do).

    Raises MissingFile, StorageError.
    """
    if is_remote(uri):
        head = s3.request("head_object", uri)
        return head["ContentLength"], s3.etag(head["ETag"], head["ContentLength"])
    with local.guarded(uri, "read") as path:
        status = path.stat()
        return status.st_size, local.etag(status)


def age_s(uri: str) -> float:
    """Seconds since a file was written, by the store's own clock where it tells. Raises MissingFile, StorageError."""
    if is_remote(uri):
        head = s3.request("head_object", uri)
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return max(0.0, (now - head["LastModified"]).total_seconds())
    with local.guarded(uri, "read") as path:
        return max(0.0, time.time() - path.stat().st_mtime)


def exists(uri: str) -> bool:
    """True for a file or a directory (on S3: something below it). Raises StorageError if that can't be known."""
    if not is_remote(uri):
        with local.guarded(uri, "read") as path:
            return path.exists()
    bucket, key = bucket_and_key(uri)
    if key and s3.request("head_object", uri, unless=s3.MISSING):
        return True
    below = s3.request("list_objects_v2", f"s3://{bucket}", MaxKeys=1, Prefix=f"{key}/" if key else "")
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
        infos = _list_s3(root, re.split(r"[*?[]", rest)[0])
    else:
        infos = _list_local(root, math.inf if "**" in parts else rest.count("/"))
    return [info for info in infos if matches(info.path)]


def _list_local(root: str, depth: float = math.inf) -> list[FileInfo]:
    with local.guarded(root, "read") as path:
        if not path.exists():
            return []
        top = path if path.is_dir() else path.parent
        files = local.walk(path, depth) if path.is_dir() else [(path, path.stat())]
        infos = [FileInfo(str(p), p.relative_to(top).as_posix(), s.st_size, local.etag(s)) for p, s in files]
    return sorted(infos, key=lambda info: info.path)


def _list_s3(root: str, start: str = "") -> list[FileInfo]:
    bucket, key = bucket_and_key(root)
    top = f"{key}/" if key else ""
    infos = []
    for entry in s3.pages(bucket, top + start):
        if not entry["Key"].endswith("/"):  # a console's marker for an empty directory
            etag = s3.etag(entry["ETag"], entry["Size"])
            infos.append(FileInfo(f"s3://{bucket}/{entry['Key']}", entry["Key"].removeprefix(top), entry["Size"], etag))
    if not infos and key and not start and (head := s3.request("head_object", root, unless=s3.MISSING)):
        size_bytes = head["ContentLength"]
        return [FileInfo(root, key.rpartition("/")[2], size_bytes, s3.etag(head["ETag"], size_bytes))]
    return sorted(infos, key=lambda info: info.path)


def write_bytes(uri: str, data: bytes, *, private: bool = False) -> None:
    """Writes or replaces a file; a reader sees the old content or the new, never a part.

    Args:
        uri: Where.
        data: What.
        private: Only the owner may read it: mode 0600 on a disk, and 0700 for directories made on the way. In a bucket its
            policy decides.

    Raises:
        StorageError: It can't be written.
    """
    if is_remote(uri):
        s3.request("put_object", uri, Body=data)
        return
    with local.guarded(uri, "written") as path, local.staged(path, private=private) as staged:
        staged.write_bytes(data)
        local.replace(staged, path)


def create_bytes(uri: str, data: bytes, *, private: bool = False) -> bool:
    """Writes a file only if there is none: of any number of writers one gets True. private: as `write_bytes`.

    Raises StorageError.
    """
    if is_remote(uri):
        # A put whose answer was lost is sent again and finds its own object: the mark tells that from another's.
        mark = {"ftray-writer": uuid4().hex}
        if s3.request("put_object", uri, ("PreconditionFailed", "412"), Body=data, IfNoneMatch="*", Metadata=mark):
            return True
        there = s3.request("head_object", uri, unless=s3.MISSING)
        return bool(there) and there.get("Metadata") == mark
    with local.guarded(uri, "written") as path, local.staged(path, private=private) as staged:
        staged.write_bytes(data)
        local.sync(staged)
        try:
            path.hardlink_to(staged)
        except FileExistsError:
            return path.exists() and path.samefile(staged)  # NFS may repeat a call that had succeeded
        local.sync(path.parent)
        return True


def delete(uri: str) -> None:
    """Deletes a file; a missing one is fine. Raises StorageError."""
    if is_remote(uri):
        s3.request("delete_object", uri, unless=s3.MISSING)
        return
    with local.guarded(uri, "deleted") as path:
        path.unlink(missing_ok=True)


def delete_tree(uri: str) -> None:
    """Deletes all below a directory, manifests first, so that a half-deleted checkpoint is not a committed one.

    A symbolic link is removed itself, at `uri` and below it: what it leads to stays as it is. A missing directory is
    fine. Raises StorageError, also for a whole bucket or the root directory.
    """
    uri = absolute(uri)
    if uri == "/" or (is_remote(uri) and not bucket_and_key(uri)[1]):
        raise StorageError(f"{uri} is all there is; name a directory below it to delete")
    if not is_remote(uri):
        with local.guarded(uri, "deleted") as path:
            local.delete_tree(path, first=(MARK, MANIFEST))
        return
    bucket, key = bucket_and_key(uri)
    keys = sorted((entry["Key"] for entry in s3.pages(bucket, f"{key}/")), key=_order_of_deletion)
    for start in range(0, len(keys), 1000):
        objects = [{"Key": k} for k in keys[start : start + 1000]]
        done = s3.request("delete_objects", f"s3://{bucket}", Delete={"Objects": objects, "Quiet": True})
        for failed in done.get("Errors", []):
            raise StorageError(f"s3://{bucket}/{failed['Key']} can't be deleted: {failed.get('Code')}; check the keys")


def _order_of_deletion(key: str) -> int:
    name = key.rpartition("/")[2]
    return (MARK, MANIFEST).index(name) if name in (MARK, MANIFEST) else 2


def link_on_the_way(root: str, uri: str) -> str | None:
    """The first symbolic link on the way from a directory to something below it, `root` left out; None without one."""
    if is_remote(root):
        return None
    path = Path(root)
    for part in Path(uri).relative_to(root).parts:
        path = path / part
        if path.is_symlink():
            return str(path)
    return None


def list_staged(uri: str) -> list[FileInfo]:
    """The temporary files of writers below a local directory, which listings leave out; links are not followed.

    A store of objects has none. Raises StorageError.
    """
    if is_remote(uri):
        return []
    with local.guarded(uri, "read") as path:
        stats = [(file, file.lstat()) for file in local.walk_staged(path)]
    return [FileInfo(str(file), file.relative_to(path).as_posix(), s.st_size, local.etag(s)) for file, s in stats]


def check_writable(uri: str) -> None:
    """Creates and deletes a small file at `uri`. Raises StorageError with the one thing that stands in the way."""
    place = absolute(uri)
    if not is_remote(place):
        with local.guarded(place, "written") as path:  # in what is already there: a mistyped path makes no directory
            place = str(next(p for p in (path, *path.parents) if p.exists()))
    probe = f"/.ftray-probe-{uuid4().hex}"
    before = s3.retry_s.set(min(10.0, s3.retry_s.get() or 10.0))  # somebody waits for the answer
    try:
        created = [create_bytes(place + probe, b"ftray") for _ in range(2)]
        delete(place + probe)
    except StorageError as error:
        raise StorageError(str(error).replace(probe, "")) from error
    finally:
        s3.retry_s.reset(before)
    if created != [True, False]:
        raise StorageError(f"{uri} lacks exclusive creation, so two runs could overwrite each other; use another store")
