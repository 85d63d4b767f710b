"""From a checkpoint to a model in one process, for evaluation and export. Knows checkpoints and models, no Ray."""

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


def load_tuned(run: config.RunConfig, found: CheckpointRef, precision: str, to_merge: bool = False) -> Any:
    """The tuned model on the CPU, in eval mode, its trained weights from the checkpoint's fp32 masters.

    precision: of the whole model; fp32 keeps the masters exact. to_merge: in fp32, with a base in 4 bits as the plain
    weights that it stands for. Raises CheckpointError if the checkpoint doesn't fit.
    """
    if to_merge and run.method.type == "qlora":
        base = unquantized(load_base(run.model, dtype_of(run.train.precision), quantize=True)).float()
        model = add_adapters(base, run.method, run.train.seed)
    else:
        model = build_model(run.model, run.method, precision, run.train.seed)
    state = load_checkpoint(found, "weights.")
    for name, parameter in trainable(model).items():
        saved = state.pop(f"weights.{name}", None)
        if saved is None or saved.shape != parameter.shape:
            raise CheckpointError(f"{found.uri} doesn't fit the model: {name} is missing or of another shape")
        parameter.data.copy_(saved)
    if left := list(state):
        raise CheckpointError(f"{found.uri} doesn't fit the model: it has {left[0]}, the model has not")
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
    """The committed checkpoint at a URI: `…/checkpoints/step-000200`, or a run's directory for its newest one.

    Raises ConfigError if there is none.
    """
    place = storage.absolute(uri)
    try:
        manifest = storage.read_manifest(place)
    except CheckpointError as err:
        raise ConfigError(f"--from: {err}") from None
    if manifest is not None and "progress" in manifest["meta"]:
        return CheckpointRef(place, manifest["meta"])
    if manifest is None and storage.exists(storage.join(place, storage.MARK)):
        raise ConfigError(
            f"--from {uri} is damaged: its {storage.MANIFEST} is missing; restore it, or give another checkpoint"
        )
    found, damaged = scan_checkpoints(place)
    if damaged and (not found or damaged[0].step > found[0].step):
        older = f", or name another: --from {found[0].uri}" if found else ""
        raise ConfigError(f"--from {uri}: its newest checkpoint is damaged: {damaged[0].reason}. Restore it{older}")
    if not found:
        raise ConfigError(
            f"--from {uri}: there is no committed checkpoint; give one (…/checkpoints/step-000200) or a run"
        )
    return found[0]


def parent_parts(uri: str, parameters: Mapping[str, Any]) -> TensorPartReader:
    """What a new run's weights are read from. Raises CheckpointError if checkpoint and parameters don't fit."""
    found = open_parent(uri)
    if problems := storage.verify_directory(found.uri):
        raise CheckpointError(f"--from {uri} is damaged ({problems[0]}); use another checkpoint")
    reader = TensorPartReader(found.uri)
    weights = {name: shape for name, shape in reader.shapes().items() if name.startswith("weights.")}
    wanted = {f"weights.{name}": tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    for name in sorted(weights.keys() | wanted.keys()):
        mine, its = wanted.get(name), weights.get(name)
        if mine is None or its is None or mine != tuple(its):
            shown = [list(shape) if shape is not None else "missing" for shape in (its, mine)]
            raise CheckpointError(
                f"--from {uri} doesn't fit this run: {name.removeprefix('weights.')} is {shown[0]} there and {shown[1]} "
                "here; model and method must be the same"
            )
    return reader
