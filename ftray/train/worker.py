"""The function that runs in each Ray Train worker: it joins the channel, trains, and reports errors that a retry cannot fix.

Imports nothing heavy at the top: Ray Train's controller loads this module, too, before it starts the workers.
"""

from __future__ import annotations

import os
import socket

import ray
import ray.train

from ftray import storage
from ftray.errors import ConfigError, FtrayError, innermost
from ftray.train.driver_channel import TrainJob, WorkerLocation
from ftray.train.failures import out_of_memory


def train_worker(arguments: dict[str, TrainJob]) -> None:
    """Trains from the newest sound checkpoint to the end, or until a stop is requested; all ranks run it.

    An FtrayError and too little memory for a step are reported to the driver: a retry would end the same way.
    """
    job = arguments["job"]
    ray.get(job.channel.join.remote(_location()))
    try:
        if not storage.exists(storage.join(job.run_dir, "run.json")):
            raise ConfigError(
                f"storage: {job.run_dir} is not visible on {socket.gethostname()}, where a worker runs; use a directory that "
                "all nodes share, or s3://…"
            )
        from ftray.train.setup import build_trainer

        build_trainer(job).train()
    except Exception as err:
        cause = innermost(err)
        if isinstance(cause, FtrayError):
            ray.get(job.channel.fail.remote(type(cause).__name__, str(cause)))
        elif (message := out_of_memory(cause)) is not None:
            ray.get(job.channel.fail.remote("RunError", message))
        raise


def _location() -> WorkerLocation:
    context = ray.get_runtime_context()
    rank = ray.train.get_context().get_world_rank()
    return WorkerLocation(rank, context.get_node_id(), socket.gethostname(), os.getpid(), context.current_actor)
