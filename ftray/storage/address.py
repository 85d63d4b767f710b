"""Addresses: the one spelling of a path or an s3:// URI, and what stands at one. Touches no disk and no network."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ftray.errors import StorageError

MANIFEST = "manifest.json"  # the file that makes a directory a committed one
MARK = "committed.json"  # written after a checkpoint's manifest, so that a manifest that was lost is noticed


class MissingFile(StorageError):
    """A file that is read does not exist."""


@dataclass(frozen=True)
class FileInfo:
    """One file of a listing: where it is, where it is relative to what was listed, and what changes when it changes."""

    uri: str
    path: str
    size_bytes: int
    etag: str


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


def bucket_and_key(uri: str) -> tuple[str, str]:
    """The two parts of an s3:// address; the key is "" for a whole bucket."""
    bucket, _, key = absolute(uri).removeprefix("s3://").partition("/")
    return bucket, key
