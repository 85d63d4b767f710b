"""Loads checkpoints: into a model in one process, for evaluation and export, and as the start of a run. No Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from ftray import config, storage
from ftray.errors import CheckpointError, ConfigError
from ftray.model.load import load_base, unquantized
from ftray.model.lora import add_adapters, build_model, dtype_of, trainable
from ftray.train.checkpoint.catalog import CheckpointRef, find_newest, scan_checkpoints
from ftray.train.checkpoint.tensors import TensorPartReader
from ftray.train.checkpoint.writer import load_checkpoint
from ftray.train.parallel import DeviceMesh


def load_tuned(run: config.RunConfig, checkpoint: CheckpointRef, precision: str, to_merge: bool = False) -> Any:
    """The trained model on the CPU, in eval mode, with the checkpoint's fp32 master weights.

    Args:
        run: The run's configuration.
        checkpoint: The checkpoint.
        precision: Of the whole model; fp32 keeps the master weights exact.
        to_merge: Dequantizes a 4-bit base to fp32, so that adapters can be merged.

    Raises:
        CheckpointError: The checkpoint does not fit the model.
    """
    if to_merge and run.method.type == "qlora":
        base = unquantized(load_base(run.model, dtype_of(run.train.precision), quantize=True)).float()
        model = add_adapters(base, run.method, run.train.seed)
    else:
        model = build_model(run.model, run.method, precision, run.train.seed)
    state = load_checkpoint(checkpoint, "weights.")
    for name, parameter in trainable(model).items():
        saved = state.pop(f"weights.{name}", None)
        if saved is None or saved.shape != parameter.shape:
            raise CheckpointError(f"{checkpoint.uri} does not fit the model: {name} is missing or has another shape")
        parameter.data.copy_(saved)
    if unknown := list(state):
        raise CheckpointError(f"{checkpoint.uri} does not fit the model, which has no {unknown[0]}")
    return model.eval()


def newest_on_all_ranks(run_dir: str, mesh: DeviceMesh, below_updates: float = math.inf) -> CheckpointRef | None:
    """The newest sound checkpoint, found by rank 0, so that all ranks take the same one. Collective.

    below_updates: As in `catalog.find_newest`.
    """
    checkpoint = None
    if mesh.is_first:
        checkpoint = find_newest(run_dir, partial(print, "warning:", flush=True), below_updates)
    result: CheckpointRef | None = mesh.broadcast(checkpoint)
    return result


def open_parent(uri: str) -> CheckpointRef:
    """The committed checkpoint at a URI: `…/checkpoints/step-000200`, or the newest one of a run's directory.

    Raises ConfigError if there is none.
    """
    directory = storage.absolute(uri)
    try:
        manifest = storage.read_manifest(directory)
    except CheckpointError as err:
        raise ConfigError(f"--from: {err}") from None
    if manifest is not None and "progress" in manifest["meta"]:
        return CheckpointRef(directory, manifest["meta"])
    if manifest is None and storage.exists(storage.join(directory, storage.MARK)):
        raise ConfigError(
            f"--from {uri} is damaged: its {storage.MANIFEST} is missing; restore it, or use another checkpoint"
        )
    checkpoints, damaged = scan_checkpoints(directory)
    if damaged and (not checkpoints or damaged[0].step > checkpoints[0].step):
        older = f", or use an older one: --from {checkpoints[0].uri}" if checkpoints else ""
        raise ConfigError(f"--from {uri}: its newest checkpoint is damaged: {damaged[0].reason}. Restore it{older}")
    if not checkpoints:
        raise ConfigError(
            f"--from {uri}: there is no committed checkpoint; give a checkpoint (…/checkpoints/step-000200) or a run"
        )
    return checkpoints[0]


def parent_parts(uri: str, parameters: Mapping[str, Any]) -> TensorPartReader:
    """Reader of the checkpoint that a new run starts from. Raises CheckpointError if it does not fit the parameters."""
    checkpoint = open_parent(uri)
    if problems := storage.verify_directory(checkpoint.uri):
        raise CheckpointError(f"--from {uri} is damaged ({problems[0]}); use another checkpoint")
    reader = TensorPartReader(checkpoint.uri)
    weights = {name: shape for name, shape in reader.shapes().items() if name.startswith("weights.")}
    expected = {f"weights.{name}": tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    for name in sorted(weights.keys() | expected.keys()):
        ours, theirs = expected.get(name), weights.get(name)
        if ours is None or theirs is None or ours != tuple(theirs):
            shown = [list(shape) if shape is not None else "missing" for shape in (theirs, ours)]
            raise CheckpointError(
                f"--from {uri} does not fit this run: {name.removeprefix('weights.')} is {shown[0]} there and {shown[1]} "
                "here; model and method must be the same"
            )
    return reader
