"""Builds a rank's DeepSpeed engine: model, memory settings, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ftray import config
from ftray.compat.deepspeed import count_overflows, without_compiler
from ftray.errors import ConfigError
from ftray.model.fp8 import FORMATS, check_device, use_eight_bits
from ftray.model.lora import build_model, trainable
from ftray.train.checkpoint.tensors import TensorPart, TensorPartReader
from ftray.train.memory import MemoryChoice
from ftray.train.memory_tuning import tune_memory
from ftray.train.objectives import objective_of
from ftray.train.objectives.base import Objective, ObjectiveModel
from ftray.train.optim.adamw import AdamW
from ftray.train.optim.loss_scaler import prepare_scaling
from ftray.train.packing_check import check_packing
from ftray.train.parallel import DeviceMesh
from ftray.train.zero.config import deepspeed_config, owns_optimizer
from ftray.train.zero.init import gather_by_layers, partition_model
from ftray.train.zero.state import local_bytes, local_parts, restore_parts


@dataclass(frozen=True)
class ZeroEngine:
    """A DeepSpeed engine with what was decided for it.

    Attributes:
        deepspeed: The engine; its module is an `ObjectiveModel`.
        parameters: Trainable parameters by name, as checkpoints name them.
        memory: Micro-batch size and gradient checkpointing.
        mesh: This rank's place.
    """

    deepspeed: Any
    parameters: dict[str, torch.nn.Parameter]
    memory: MemoryChoice
    mesh: DeviceMesh

    @property
    def objective(self) -> Objective:
        """What the engine's module computes."""
        objective: Objective = self.deepspeed.module.objective
        return objective

    def parts(self) -> list[TensorPart]:
        """This rank's share of the training state; see `state.local_parts`."""
        return local_parts(self.deepspeed, self.parameters, self.mesh)

    def num_bytes(self) -> int:
        """Bytes of `parts` once there are moments."""
        return local_bytes(self.deepspeed, self.parameters, self.mesh)

    def restore(self, reader: TensorPartReader, num_updates: int) -> None:
        """Restores the training state; see `state.restore_parts`. Raises CheckpointError."""
        restore_parts(self.deepspeed, self.parameters, reader.read_many, num_updates, self.mesh)


def build_engine(
    run: config.RunConfig, mesh: DeviceMesh, micro_batch_before: int | None = None, most_documents: int = 1
) -> ZeroEngine:
    """Loads the base, checks it, chooses the memory settings and starts DeepSpeed. Collective.

    Args:
        run: The run's configuration.
        mesh: This rank's place.
        micro_batch_before: Micro-batch size of the checkpoint that the run continues from; kept if it fits.
        most_documents: Documents of the packed sequence with the most.

    Raises:
        ConfigError: A setting does not fit the model or the device.
        ModelError: The base cannot be loaded or packed.
    """
    without_compiler()
    import deepspeed

    train = run.train
    if mesh.device.type == "cpu":
        torch.set_num_threads(max(1, int(run.scale.cpus_per_worker)))
    model = build_objective_model(run, mesh)
    parameters = trainable(model.model)
    check_packing(run, model, mesh.device)
    memory = tune_memory(run, model, mesh, micro_batch_before, most_documents)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(list(parameters.values()), run, mesh.device),
        config=deepspeed_config(train, run.deepspeed, memory.micro_batch_size, mesh.data_size),
        dist_init_required=False,
    )
    count_overflows(engine)
    prepare_scaling(engine)
    return ZeroEngine(engine, parameters, memory, mesh)


def build_objective_model(run: config.RunConfig, mesh: DeviceMesh) -> ObjectiveModel:
    """The model with its objective on this rank's device; under ZeRO-3 its part of each weight.

    Under ZeRO-3 no device ever holds the whole model.
    """
    is_sharded = run.deepspeed.zero_stage == 3
    outline = is_sharded and not mesh.is_first
    tuned = build_model(run.model, run.method, run.train.precision, run.train.seed, outline)
    if run.method.base_precision is not None:
        check_device(FORMATS[run.method.base_precision], mesh.device)
        if not use_eight_bits(tuned, run.method, mesh.device):
            remedy = "" if run.method.type == "full" else "add such layers to method.target_modules, or "
            raise ConfigError(
                f"method.base_precision {run.method.base_precision}: this model has no trained feed-forward layer that can be "
                f"computed in 8 bits; {remedy}leave base_precision out"
            )
    model = ObjectiveModel(tuned, objective_of(run)).train()
    if not is_sharded:
        return model.to(mesh.device)
    partition_model(model, deepspeed_config(run.train, run.deepspeed, 1, mesh.data_size), mesh)
    gather_by_layers(model.decoder)
    return model


def _optimizer(
    parameters: list[torch.nn.Parameter], run: config.RunConfig, device: torch.device
) -> torch.optim.Optimizer:
    """ftray's AdamW at stage 0; torch's under ZeRO, where DeepSpeed hands it shards of the fp32 masters."""
    train = run.train
    if owns_optimizer(train, run.deepspeed):
        return AdamW(parameters, train.learning_rate, train.weight_decay, train.max_grad_norm, train.optimizer)
    fused = device.type == "cuda"
    # The trainer sets the rate of each step; DeepSpeed may make an empty step before the first.
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=train.weight_decay, fused=fused)
