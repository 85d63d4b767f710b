"""Datasets of the Hugging Face hub as parquet files in ftray's cache, through the library `datasets`.

`hf:org/name`, then, where wanted, `/config`, `:split` (train if left out; slices such as `train[:10%]` too) and
`@revision`. In place of `org/name` there may be a local directory in the layout of a hub dataset (`hf:./dir`,
`hf:/dir`), without `/config`. Keys (HF_TOKEN), another endpoint (HF_ENDPOINT) and the download cache (HF_HOME) are the
library's own. Knows nothing of records.
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
GROUP_RECORDS = 1_000  # records of a row group, the least that a chunk can be


def resolve(path: str) -> str:
    """Local directory with the dataset's split as .parquet files, written if it isn't there.

    Its name covers the dataset's fingerprint, so that another revision lies in another directory. Raises DataError:
    not of this form, or it can't be had.
    """
    found = PATTERN.fullmatch(path)
    if found is None:
        raise DataError(
            f"{path} is no dataset of the hub; write hf:org/name, then /config, :split and @revision if needed"
        )
    dataset = _load(path, **found.groupdict())
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
        raise DataError(f"{path} can't be had: {reason}") from None
    finally:
        datasets.utils.logging.set_verbosity(quiet)


def _check_files(path: str, data_files: Mapping[str, Sequence[str]] | None, root: str) -> None:
    """Refuses a dataset that names files of others: the patterns in its README.md may begin with `/` or hold `..`.

    Args:
        path: The source, for the message.
        data_files: By split, the addresses that the patterns found.
        root: How an address within the dataset begins.

    Raises:
        DataError: A file lies outside the dataset.
    """
    for files in (data_files or {}).values():
        for name in map(str, files):
            scheme, _, rest = name.rpartition("://")
            plain = f"{scheme}://{posixpath.normpath(rest)}" if scheme else posixpath.normpath(name)
            if not plain.startswith(root if root.endswith("@") else f"{root}/"):
                raise DataError(
                    f"{path} names {name} as its data, which is no file of that dataset; correct data_files in its README.md"
                )


def _write(dataset: Any, directory: Path) -> None:
    """All files, or none: written beside, then moved."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".new-", dir=directory.parent))
    try:
        for number, start in enumerate(range(0, len(dataset), FILE_RECORDS)):
            part = dataset.select(range(start, min(start + FILE_RECORDS, len(dataset))))
            part.to_parquet(str(staged / f"part-{number:05d}.parquet"), batch_size=GROUP_RECORDS)
        staged.rename(directory)
    except OSError:
        if not directory.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
