"""Checks before Ray starts: incompatible settings, the base model, the files of the data sources."""

from __future__ import annotations

from ftray import config
from ftray.data.sources import list_shards
from ftray.errors import ConfigError
from ftray.model.load import check_base
from ftray.model.lora import check_targets
from ftray.train.checkpoint.catalog import CheckpointRef, best_checkpoint
from ftray.train.zero.config import deepspeed_config


def preflight(run: config.RunConfig) -> None:
    """Raises ConfigError, ModelError or DataError for a problem that is known before Ray starts."""
    deepspeed_config(run.train, run.deepspeed, run.micro_batch_size, run.world_sizes[0])
    eval_sources = run.data.eval if isinstance(run.data.eval, list) else []
    for source in [*run.data.train, *eval_sources]:
        list_shards(source.path)
    check_examples(run)
    check_base(run.model)
    check_targets(run.model, run.method)


def check_examples(run: config.RunConfig) -> None:
    """Raises ConfigError for a record format that the run's objective does not accept."""
    from ftray.train.objectives import objective_of

    objective = objective_of(run)
    for source in run.data.train:
        if not objective.examples.accepts(source.format):
            raise ConfigError(
                f"data.train: {source.path} has format {source.format}, which the objective {objective.name} does not accept "
                f"(it accepts {', '.join(sorted(objective.examples.kinds))}); correct data.train[].format"
            )


def check_evaluation(run: config.RunConfig, run_dir: str, step: int | None = None) -> CheckpointRef:
    """The checkpoint that is compared with the base: the one of this step, or the best.

    Raises ConfigError without an eval set or a checkpoint, CheckpointError for a damaged one.
    """
    if run.data.eval is None:
        raise ConfigError("data.eval is missing, and evaluation needs an eval set; add data.eval: {fraction: 0.1}")
    return best_checkpoint(run_dir, step)
