"""What can be looked at before Ray starts: settings that exclude each other, the base model, the sources' files."""

from __future__ import annotations

from ftray import config
from ftray.data.sources import list_shards
from ftray.model.load import check_base
from ftray.train.zero import deepspeed_config


def preflight(run: config.Run) -> None:
    """Raises ConfigError, ModelError or DataError for what is wrong already now."""
    deepspeed_config(run.train, run.deepspeed, run.micro_batch_size, run.scale.num_workers)
    held_out = run.data.eval if isinstance(run.data.eval, list) else []
    for source in [*run.data.train, *held_out]:
        list_shards(source.path)
    check_base(run.model)
