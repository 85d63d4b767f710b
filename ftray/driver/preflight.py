"""What can be looked at before Ray starts: settings that exclude each other, the base model, the sources' files."""

from __future__ import annotations

from ftray import config
from ftray.data.sources import list_shards
from ftray.errors import ConfigError
from ftray.model.load import check_base
from ftray.model.lora import check_targets
from ftray.train.checkpoint.catalog import CheckpointRef, best_checkpoint
from ftray.train.zero.config import deepspeed_config


def preflight(run: config.RunConfig) -> None:
    """Raises ConfigError, ModelError or DataError for what is wrong already now."""
    deepspeed_config(run.train, run.deepspeed, run.micro_batch_size, run.world_sizes[0])
    held_out = run.data.eval if isinstance(run.data.eval, list) else []
    for source in [*run.data.train, *held_out]:
        list_shards(source.path)
    check_base(run.model)
    check_targets(run.model, run.method)


def check_evaluation(run: config.RunConfig, run_dir: str, step: int | None = None) -> CheckpointRef:
    """The checkpoint to be compared with the base: of this step, or the best.

    Raises ConfigError without held-out data or without a checkpoint, CheckpointError for a damaged one.
    """
    if run.data.eval is None:
        raise ConfigError("data.eval is missing, so there is nothing to compare on; add data.eval: {fraction: 0.1}")
    return best_checkpoint(run_dir, step)
