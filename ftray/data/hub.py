"""Datasets of the Hugging Face hub, as Parquet files in ftray's cache, through the library `datasets`.

`hf:org/name`, optionally followed by `/config`, `:split` (default: train; slices such as `train[:10%]` work) and `@revision`.
Instead of `org/name` a local directory in the layout of a hub dataset is possible (`hf:./dir`, `hf:/dir`), without `/config`.
Tokens (HF_TOKEN), other endpoints (HF_ENDPOINT) and the download cache (HF_HOME) are the library's own. Knows no records.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftray import storage
from ftray.compat.datasets import fingerprint
from ftray.errors import DataError

PATTERN = re.compile(
    r"hf:(?:(?P<directory>[./~][^:@]*)|(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?)"
    r"(?::(?P<split>[\w.\[\]:%+-]+))?(?:@(?P<revision>\S+))?"
)
FILE_RECORDS = 100_000
GROUP_RECORDS = 1_000  # records of a row group, which is the smallest chunk


def resolve(path: str) -> str:
    """The local directory with the dataset's split as .parquet files, which are written if they do not exist.

    Its name covers the dataset's fingerprint, so each revision has its own directory.

    Raises:
        DataError: The address is malformed, or the dataset cannot be loaded.
    """
    match = PATTERN.fullmatch(path)
    if match is None:
        raise DataError(
            f"{path} is not a dataset of the hub; write hf:org/name, with /config, :split and @revision if needed"
        )
    dataset = _load(path, **match.groupdict())
    plain = re.sub(r"[^\w.-]+", "-", path.removeprefix("hf:")).strip("-.")[-60:]
    identity = hashlib.sha256(fingerprint(dataset).encode()).hexdigest()[:16]
    directory = storage.cache_directory() / "hub" / f"{plain}-{identity}"
    if not directory.exists():
        _write(dataset, directory)
    return str(directory)


def _load(
    path: str, directory: str | None, name: str | None, config: str | None, split: str | None, revision: str | None
) -> Any:
    import datasets

    quiet = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        base = str(Path(directory).expanduser().resolve()) if directory else str(name)
        builder = datasets.load_dataset_builder(base, config, revision=revision)
        _check_files(path, builder.config.data_files, base if directory else f"hf://datasets/{base}@")
        builder.download_and_prepare()
        return builder.as_dataset(split=split or "train")
    except DataError:
        raise
    except Exception as err:  # noqa: BLE001 - the library raises its own errors, the hub's, and those of every file format
        reason = " ".join(str(err).split())[:300] or type(err).__name__
        raise DataError(f"{path} could not be loaded: {reason}") from None
    finally:
        datasets.utils.logging.set_verbosity(quiet)


def _check_files(path: str, data_files: Mapping[str, Sequence[str]] | None, root: str) -> None:
    """Refuses a dataset that names files of others: the patterns in its README.md may begin with `/` or contain `..`.

    Args:
        path: The source, for the message.
        data_files: The addresses that the patterns match, by split.
        root: The beginning of an address within the dataset.

    Raises:
        DataError: A file lies outside the dataset.
    """
    for files in (data_files or {}).values():
        for name in map(str, files):
            scheme, _, rest = name.rpartition("://")
            plain = f"{scheme}://{posixpath.normpath(rest)}" if scheme else posixpath.normpath(name)
            if not plain.startswith(root if root.endswith("@") else f"{root}/"):
                raise DataError(
                    f"{path} names {name} as its data, which is not a file of that dataset; correct data_files in its README.md"
                )


def _write(dataset: Any, directory: Path) -> None:
    """Writes all files or none: into a temporary directory, which is then renamed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".new-", dir=directory.parent))
    try:
        for number, start in enumerate(range(0, len(dataset), FILE_RECORDS)):
            part = dataset.select(range(start, min(start + FILE_RECORDS, len(dataset))))
            part.to_parquet(str(staged / f"part-{number:05d}.parquet"), batch_size=GROUP_RECORDS)
        staged.rename(directory)
    except OSError:
        if not directory.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
