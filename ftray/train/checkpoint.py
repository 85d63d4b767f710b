"""What is in a checkpoint, and how it is committed without stopping training.

Knows storage and tensors by name; nothing of DeepSpeed or data. Tensors in safetensors, state in JSON, manifest.json
(size and sha256 of each file) written last.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ftray import storage
from ftray.errors import CheckpointError, StorageError
from ftray.train.timeline import Found, Progress, list_checkpoints

TENSORS, STATE = "state.safetensors", "state.json"


def load_checkpoint(found: Found) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, verified against its manifest while they are read. Raises CheckpointError."""
    with tempfile.TemporaryDirectory(prefix="ftray-") as directory:
        storage.fetch_directory(found.uri, directory)
        return load_file(Path(directory) / TENSORS)


def _reason(error: Exception) -> str:
    if "No space left" in str(error) or "File too large" in str(error):
        return "no space is left on the device; free some, or set another storage (TMPDIR, where it is staged for S3)"
    return " ".join(str(error).split())


@contextmanager
def _staging(uri: str) -> Iterator[str]:
    """Where a checkpoint's files are written before they are committed: on local disk the place itself, not a copy."""
    place = uri
    try:
        if storage.is_remote(uri):
            with tempfile.TemporaryDirectory(prefix="ftray-") as directory:
                place = directory
                yield directory
        else:
            Path(uri).mkdir(parents=True, exist_ok=True)
            yield uri
    except (OSError, SafetensorError) as err:  # not what storage raises: those are sentences already
        if not storage.is_remote(uri):
            with suppress(StorageError):
                storage.delete_tree(uri)  # half a checkpoint would only fill the disk further
        raise StorageError(f"{place} can't be written: {_reason(err)}") from err


class CheckpointWriter:
    """Commits checkpoints on a thread of its own, one at a time; training waits only while the last is under way.

    meta: goes into each manifest (config hash, data hash, versions). keep: newest ones that stay; the best stays besides.
    """

    def __init__(self, run_dir: str, keep: int, meta: dict[str, Any]) -> None:
        self._run_dir, self._keep, self._meta = run_dir, keep, meta
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ftray-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor], lines: list[dict[str, Any]]) -> None:
        """Starts to commit. tensors must not change afterwards. Raises what the commit before it raised.

        lines: metrics since the last checkpoint. Raises CheckpointError for an empty or missing tensor.
        """
        self.wait()
        for name, tensor in tensors.items():
            if tensor.numel() == 0:
                raise CheckpointError(
                    f"step {progress.step}: the tensor {name} is empty; this is a fault of ftray, please report it"
                )
        if not any(name.startswith("weights.") for name in tensors):
            raise CheckpointError(
                f"step {progress.step}: there are no weights to save; this is a fault of ftray, please report it"
            )
        if lines:
            first = int(lines[0]["step"])
            segment = f"{first:08d}-{int(lines[-1]['step']):08d}.jsonl"
            progress.segments = [s for s in progress.segments if int(s[:8]) < first] + [segment]
        snapshot = Progress(**json.loads(json.dumps(asdict(progress))))
        self._pending = self._pool.submit(self._commit, snapshot, tensors, list(lines))

    def wait(self) -> None:
        """Returns when the last commit is done. Raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _commit(self, progress: Progress, tensors: dict[str, torch.Tensor], lines: list[dict[str, Any]]) -> None:
        with storage.patient():  # training goes on meanwhile, and waits no earlier than at the next checkpoint
            self._write(progress, tensors, lines)

    def _write(self, progress: Progress, tensors: dict[str, torch.Tensor], lines: list[dict[str, Any]]) -> None:
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            storage.write_bytes(storage.join(self._run_dir, "metrics", progress.segments[-1]), text.encode())
        uri = storage.join(self._run_dir, "checkpoints", f"step-{progress.step:06d}")
        if storage.exists(storage.join(uri, "manifest.json")) and not storage.verify_directory(uri):
            there = storage.read_manifest(uri)
            if there is not None and there["meta"].get("config_hash") == self._meta.get("config_hash"):
                return  # committed before an interruption, and sound
        storage.delete_tree(uri)  # damaged, or left by a writer that was killed: without a manifest it doesn't exist
        with _staging(uri) as directory:
            save_file(tensors, Path(directory) / TENSORS)
            Path(directory, STATE).write_text(json.dumps(asdict(progress), indent=1))
            if not storage.commit_directory(directory, uri, {**self._meta, "progress": asdict(progress)}):
                raise CheckpointError(f"{uri} was committed by another process; only one may own the run")
        self._sweep(progress)

    def _sweep(self, progress: Progress) -> None:
        best = int(progress.best["step"]) if progress.best else None
        for found in list_checkpoints(self._run_dir)[self._keep :]:
            if found.step != best:
                storage.delete(storage.join(found.uri, "manifest.json"))  # first: what has no manifest doesn't exist
                storage.delete_tree(found.uri)
