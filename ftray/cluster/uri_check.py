"""Checks which paths of a run the machines of a cluster can reach. Needs neither network nor Ray."""

from __future__ import annotations

from pathlib import Path

from ftray import config, storage
from ftray.errors import ConfigError

FROM_ANYWHERE = ("s3://", "hf:", "embedded:")


def sources_of(run: config.RunConfig) -> list[tuple[str, str]]:
    """(dotted key, path) of every source."""
    sources = [(f"data.train.{n}.path", source.path) for n, source in enumerate(run.data.train)]
    eval_sources = run.data.eval if isinstance(run.data.eval, list) else []
    return sources + [(f"data.eval.{n}.path", source.path) for n, source in enumerate(eval_sources)]


def local_extras(run: config.RunConfig) -> list[str]:
    """Relative paths that are uploaded with a job: sources and a base beside the run file. Raises ConfigError."""
    relative_paths = [path for _, path in sources_of(run) if _is_relative(path)]
    if _is_relative(run.model.base) and (run.model.base.startswith(".") or Path(run.model.base).is_dir()):
        relative_paths.append(run.model.base)
    for path in relative_paths:
        if ".." in Path(path).parts:
            raise ConfigError(
                f"{path} is outside the directory that is uploaded with a job; put it in a bucket (s3://…)"
            )
    return relative_paths


def reads_hub(run: config.RunConfig) -> bool:
    """Whether the base or a data source is downloaded from the model hub."""
    paths = [run.model.base, *(path for _, path in sources_of(run))]
    return any(path.startswith("hf:") or not path.startswith(FROM_ANYWHERE) for path in paths)


def check_storage(run: config.RunConfig) -> None:
    """Raises ConfigError if the run would write to a machine that goes away."""
    if storage.is_remote(run.storage) or Path(run.storage).is_absolute():
        return
    raise ConfigError(
        f"storage {run.storage} is a directory of this machine; on a cluster use a bucket (s3://bucket/prefix), or an "
        "absolute path that all machines share: storage=s3://…"
    )


def check_pods(run: config.RunConfig) -> None:
    """Raises ConfigError for a path that pods can't reach, because they share no disk."""
    if not storage.is_remote(run.storage):
        raise ConfigError(f"storage {run.storage}: pods share no disk; use a bucket: storage=s3://bucket/prefix")
    for key, path in sources_of(run):
        if not path.startswith(FROM_ANYWHERE):
            raise ConfigError(f"{key} {path}: pods share no disk; copy it to a bucket and use s3://…")
    base = run.model.base
    if base.startswith((".", "/", "~")) or Path(base).expanduser().is_dir():
        raise ConfigError(f"model.base {base}: pods share no disk; use a hub id (org/name)")


def _is_relative(path: str) -> bool:
    return not path.startswith((*FROM_ANYWHERE, "/", "~", "file://"))
