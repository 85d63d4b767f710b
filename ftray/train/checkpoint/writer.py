"""Commits checkpoints without stopping training, and reads them again.

Each rank writes its share of the tensors; adapters are small, and rank 0 writes all of them. State is in JSON. manifest.json,
with size and sha256 of each file, is written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ftray import config, errors, storage
from ftray.errors import CheckpointError, RunHeldError, StorageError
from ftray.storage import local
from ftray.train.checkpoint.catalog import CheckpointRef, RunProgress, list_checkpoints
from ftray.train.checkpoint.tensors import (
    NAMES,
    HostBuffer,
    Layout,
    TensorPart,
    TensorPartReader,
    assemble,
    check_complete,
    layout,
    num_bytes,
    pieces,
    write_parts,
)
from ftray.train.parallel import DeviceMesh
from ftray.train.segments import as_text, segment_sum

if TYPE_CHECKING:
    from ftray.data.loader import LoadPlan

WHOLE, SHARE, STATE = "state.safetensors", "state-{:05d}-of-{:05d}.safetensors", "state.json"


def load_checkpoint(checkpoint: CheckpointRef, prefix: str = "") -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint whose names start with `prefix`, verified first. Raises CheckpointError."""
    with tempfile.TemporaryDirectory(prefix="ftray-") as directory:
        uri = checkpoint.uri
        if storage.is_remote(uri):
            storage.fetch_directory(uri, directory)
            uri = directory
        elif problems := storage.verify_directory(uri):
            raise CheckpointError(
                f"{uri} is damaged ({problems[0]}); restore it, continue from the previous checkpoint (ftray train), or choose "
                "another one with --step"
            )
        reader = TensorPartReader(uri)
        return {name: reader.whole(name) for name in reader.shapes() if name.startswith(prefix)}


@contextmanager
def _staging(uri: str) -> Iterator[Path]:
    """Where a checkpoint's files are written before they are committed; in local storage the directory itself."""
    if storage.is_remote(uri):
        with tempfile.TemporaryDirectory(prefix="ftray-") as directory:
            yield Path(directory)
    else:
        with local.guarded(uri, "written") as path:
            path.mkdir(parents=True, exist_ok=True)
        yield path


class CheckpointBarrier:
    """Communication between the checkpoint writers of all ranks, on their own threads, separate from training's.

    All ranks create it at the same time, and use it in the same order.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank, self.world_size = mesh.rank, mesh.world_size
        self._group = dist.new_group(backend="gloo") if mesh.world_size > 1 else None

    def gather(self, act: Callable[[], Any]) -> list[Any]:
        """The results of `act` on all ranks, on each of them. If one rank raises, all raise."""
        failure: Exception | None = None
        mine: tuple[str, Any] = ("", None)
        try:
            mine = ("", act())
        except Exception as err:  # noqa: BLE001 - raised again once the others know
            failure, mine = err, (type(err).__name__, str(err))
        results: list[Any] = [mine] * self.world_size
        if self._group is not None:
            dist.all_gather_object(results, mine, group=self._group)
        if failure is not None:
            raise failure
        for kind, value in results:
            if kind:
                raise getattr(errors, kind, CheckpointError)(value)
        return [value for _, value in results]

    def collect(self, flat: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        """On rank 0 the bytes of every rank; elsewhere []. flat: This rank's bytes, uint8. sizes: Bytes of each rank."""
        if self.rank > 0:
            if len(flat):
                dist.send(flat, 0, group=self._group)
            return []
        shares = [flat, *(torch.empty(size, dtype=torch.uint8) for size in sizes[1:])]
        for rank in range(1, self.world_size):
            if sizes[rank]:
                dist.recv(shares[rank], rank, group=self._group)
        return shares


class CheckpointSchedule:
    """When checkpoints are due: every so many steps or epochs, or after a time.

    Args:
        settings: The section `checkpoint`.
        plan: The plan of the data.
        mesh: This rank's place.
    """

    def __init__(self, settings: config.CheckpointConfig, plan: LoadPlan, mesh: DeviceMesh) -> None:
        self._settings, self._plan, self._mesh = settings, plan, mesh
        self._saved_s = time.monotonic()

    def saved(self) -> None:
        """A checkpoint was saved now."""
        self._saved_s = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint follows after `step` steps. By time, rank 0's clock decides for all. Collective."""
        settings, plan = self._settings, self._plan
        if isinstance(settings.every, int):
            return step % settings.every == 0
        if settings.every_epochs is not None:
            rows, size = settings.every_epochs * plan.mixture.sequences_per_epoch, plan.global_batch_size
            return int(step * size // rows) > int((step - 1) * size // rows)
        due = self._mesh.is_first and time.monotonic() - self._saved_s >= (settings.every_s or 0)
        return self._mesh.sum([float(due)])[0] > 0


class CheckpointWriter:
    """Commits checkpoints on its own thread, one at a time; training waits only while the previous one is being committed.

    Every rank has a writer and saves at the same steps.

    Args:
        run_dir: The run's directory.
        keep: Newest checkpoints that are kept; the best one is kept in addition.
        meta: Goes into each manifest: config hash, data hash, versions.
        whole: Writes one file with all tensors, for small states.
        mesh: This rank's place; a single rank by default.
        lease: Nothing is written once another process holds the run.
    """

    def __init__(
        self,
        run_dir: str,
        keep: int,
        meta: dict[str, Any],
        whole: bool,
        mesh: DeviceMesh | None = None,
        lease: storage.Token | None = None,
    ) -> None:
        self._run_dir, self._keep, self._meta, self._whole, self._lease = run_dir, keep, meta, whole, lease
        self._ranks, self._buffer = CheckpointBarrier(mesh or DeviceMesh(0, 1)), HostBuffer()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ftray-checkpoint")
        self._pending: Future[None] | None = None

    def reserve(self, num: int) -> None:
        """Allocates host memory for `num` bytes in the background, so that the first checkpoint does not wait for it."""
        self._pending = self._pool.submit(self._buffer.reserve, num)

    def save(self, progress: RunProgress, parts: list[TensorPart], lines: list[dict[str, Any]]) -> None:
        """Copies this rank's parts and starts to commit them. Raises the error of the previous commit.

        lines: Metrics since the last checkpoint.
        """
        self.wait()
        if lines:
            first = int(lines[0]["step"])
            segment = f"{first:08d}-{int(lines[-1]['step']):08d}.jsonl"
            progress.segments = [s for s in progress.segments if int(s[:8]) < first] + [segment]
            text = as_text([_plain_json(line) for line in lines])
            progress.sums = {s: progress.sums[s] for s in progress.segments if s in progress.sums}
            progress.sums[segment] = segment_sum(text)
        snapshot = RunProgress(**json.loads(json.dumps(asdict(progress))))
        held = self._buffer.hold(parts)
        self._pending = self._pool.submit(self._commit, snapshot, held, list(lines))

    def is_idle(self) -> bool:
        """Whether no commit is running."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Waits for the last commit. Raises its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _commit(self, progress: RunProgress, parts: list[TensorPart], lines: list[dict[str, Any]]) -> None:
        uri = storage.join(self._run_dir, "checkpoints", f"step-{progress.step:06d}")
        try:
            with storage.patient():  # training continues until the next checkpoint
                self._commit_to(uri, progress, parts, lines)
        except StorageError:
            if self._ranks.rank == 0 and not storage.is_remote(uri):
                with suppress(StorageError):  # an incomplete checkpoint would only fill the disk
                    if not storage.exists(storage.join(uri, storage.MANIFEST)):
                        storage.delete_tree(uri)
            raise

    def _commit_to(self, uri: str, progress: RunProgress, parts: list[TensorPart], lines: list[dict[str, Any]]) -> None:
        ranks = self._ranks
        if not ranks.gather(lambda: ranks.rank > 0 or self._clear(uri, progress, lines))[0]:
            return
        laid = ranks.gather(lambda: layout(parts))
        check_complete(laid)
        moved_at = progress.step if _has_moved(lines) else 0
        entries: dict[str, dict[str, Any]] = {}
        for share in ranks.gather(lambda: self._write(uri, laid, moved_at)):
            entries |= share
        if ranks.rank > 0:
            return
        state = json.dumps(asdict(progress), indent=1).encode()
        storage.write_bytes(storage.join(uri, STATE), state)
        entries[STATE] = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        self._check_owner()
        committed = storage.commit_files(uri, entries, {**self._meta, "progress": asdict(progress)})
        if not committed and not self._is_there(uri):
            raise CheckpointError(f"{uri} was committed by another process; only one process may own the run")
        storage.write_bytes(storage.join(uri, storage.MARK), json.dumps({"step": progress.step}).encode())
        self._delete_old(progress)

    def _clear(self, uri: str, progress: RunProgress, lines: list[dict[str, Any]]) -> bool:
        """Rank 0, first: writes the metrics and removes leftovers. False if this checkpoint is there already, and sound."""
        self._check_owner()
        if lines:
            text = as_text([_plain_json(line) for line in lines])
            storage.write_bytes(storage.join(self._run_dir, "metrics", progress.segments[-1]), text.encode())
        if self._is_there(uri):
            return False  # committed before an interruption
        storage.delete_tree(uri)  # damaged, or left by a writer that was killed
        return True

    def _is_there(self, uri: str) -> bool:
        """Whether a sound checkpoint of this run is committed there."""
        if not storage.exists(storage.join(uri, storage.MANIFEST)) or storage.verify_directory(uri):
            return False
        there = storage.read_manifest(uri)
        return there is not None and there["meta"].get("config_hash") == self._meta.get("config_hash")

    def _check_owner(self) -> None:
        if self._lease is not None and not storage.holds(self._lease):
            raise RunHeldError("another process took over the run; this one stops writing. Watch that process instead")

    def _write(self, uri: str, laid: list[Layout], moved_at: int) -> dict[str, Any]:
        """Writes this rank's file, if it has one; its manifest entry by name."""
        mine = laid[self._ranks.rank]
        name, chunks = (
            SHARE.format(self._ranks.rank, self._ranks.world_size),
            pieces(self._buffer.first(num_bytes(mine))),
        )
        if self._whole:
            sizes = [num_bytes(one) for one in laid]
            shares = self._ranks.collect(self._buffer.first(sizes[self._ranks.rank]), sizes)
            whole = assemble(laid, shares) if shares else {}
            if moved_at:
                check_moved(whole, moved_at)
            mine = {n: [NAMES[t.dtype], list(t.shape), 0, t.numel()] for n, t in whole.items()}
            name, chunks = WHOLE, (piece for t in whole.values() for piece in pieces(t.flatten()))
        if not mine:
            return {}  # a rank without parameters, or one that sent its part to rank 0
        with _staging(uri) as directory:
            sha256 = write_parts(directory / name, mine, chunks)
            return {name: storage.put_file(str(directory / name), uri, name, sha256)}

    def _delete_old(self, progress: RunProgress) -> None:
        best = int(progress.best["step"]) if progress.best else None
        # Newer checkpoints were skipped as damaged: they must not displace sound ones.
        checkpoints = [each for each in list_checkpoints(self._run_dir) if each.step <= progress.step]
        for checkpoint in checkpoints[self._keep :]:
            if checkpoint.step != best:
                storage.delete_tree(checkpoint.uri)


def check_moved(tensors: dict[str, torch.Tensor], step: int) -> None:
    """Raises CheckpointError if all of LoRA's B matrices are still zero even though steps had gradients."""
    outward = [tensor for name, tensor in tensors.items() if name.startswith("weights.") and ".lora_B." in name]
    if outward and not any(bool(tensor.any()) for tensor in outward):
        raise CheckpointError(
            f"step {step}: all of LoRA's B matrices are zero, even though steps had gradients; this is a bug in ftray, please "
            "report it"
        )


def _plain_json(line: dict[str, Any]) -> dict[str, Any]:
    """The line with null in place of values that are not finite: JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _has_moved(lines: list[dict[str, Any]]) -> bool:
    """Whether a step among these metrics changed the weights."""
    return any(x.get("learning_rate") and x.get("grad_norm") and not x.get("skipped") for x in lines)
