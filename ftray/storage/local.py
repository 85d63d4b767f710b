"""The local disk: writes are atomic, and every OSError becomes a sentence."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from ftray.errors import StorageError
from ftray.storage.address import MissingFile, absolute

_TEMP_SUFFIX = ".ftray-tmp"
_REASONS = {
    errno.EACCES: "there is no permission; change its owner or mode, or choose another place",
    errno.EDQUOT: "the quota is used up; free some space, or choose another place",
    errno.EEXIST: "a part of the path is a file and not a directory; choose another place",
    errno.EFBIG: "no space is left for a file so large (a quota, a limit, the file system); choose another place",
    errno.EISDIR: "it is a directory and not a file",
    errno.ENOENT: "nothing can be made here; choose another place",
    errno.ENOSPC: "no space is left on the device; free some, or choose another place",
    errno.ENOTDIR: "a part of the path is a file and not a directory; choose another place",
    errno.ENOTSUP: "the file system has no hard links, which exclusive creation needs; choose another place",
    errno.EPERM: "the operation is not permitted here; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
}


@contextmanager
def guarded(uri: str, done: str) -> Iterator[Path]:
    """The local path of `uri`; `done` is "read", "written" or "deleted". Raises StorageError for any OSError inside."""
    path = Path(absolute(uri))
    try:
        yield path
    except OSError as error:
        if isinstance(error, FileNotFoundError) and done == "read":
            raise MissingFile(f"{error.filename or path} does not exist; check the path") from error
        reason = _REASONS.get(error.errno or 0) or os.strerror(error.errno or errno.EIO)
        raise StorageError(f"{path} can't be {done}: {reason}") from error


@contextmanager
def staged(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary neighbour of `path` to fill and move; its directory is made, and what was not moved is removed.

    private: the neighbour is there already, empty and of mode 0600; directories that are made have mode 0700.
    """
    if private:
        missing = [directory for directory in (path.parent, *path.parent.parents) if not directory.exists()]
        for directory in reversed(missing):  # with `parents`, those between would have the usual mode
            directory.mkdir(mode=0o700, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid4().hex}{_TEMP_SUFFIX}"
    if private:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file or a directory's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems can't sync a directory
            raise
    finally:
        os.close(handle)


def replace(temporary: Path, path: Path) -> None:
    """Moves a filled neighbour to `path`, content and entry on disk."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def etag(status: os.stat_result) -> str:
    """What changes when a file's size or mtime does."""
    return hashlib.blake2b(f"{status.st_size} {status.st_mtime_ns}".encode(), digest_size=16).hexdigest()


def delete_tree(path: Path, first: tuple[str, ...]) -> None:
    """Deletes a directory: files of these names first, then the rest. Links are removed, never followed."""
    if path.is_symlink():
        path.unlink()
        return
    if not path.exists():
        return
    for name in first:
        for _, _, names, directory in os.fwalk(path):
            if name in names:
                os.unlink(name, dir_fd=directory)
    shutil.rmtree(path)


def walk_staged(root: Path) -> Iterator[Path]:
    """What `staged` made below a directory and nobody moved."""
    for top, _, names in os.walk(root):
        yield from (Path(top, name) for name in names if name.startswith(".") and name.endswith(_TEMP_SUFFIX))


def walk(
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
            yield from walk(Path(entry.path), depth - 1, above)
        elif stat.S_ISREG(status.st_mode) and not entry.name.endswith(_TEMP_SUFFIX):
            yield Path(entry.path), status


def cache_directory() -> Path:
    """Directory for local caches: $FTRAY_CACHE, otherwise $XDG_CACHE_HOME/ftray, otherwise ~/.cache/ftray."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FTRAY_CACHE") or f"{base}/ftray").expanduser().absolute()
