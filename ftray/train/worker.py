"""What runs in each Ray Train worker: it tells where it is, trains, and tells what trying again won't cure.

Imports nothing heavy at the top: Ray Train's controller loads this module, too, before it starts the workers.
"""

from __future__ import annotations

import os
import socket

import ray
import ray.train

from ftray import storage
from ftray.errors import ConfigError, FtrayError, innermost
from ftray.train.driver_channel import WorkerLocation
from ftray.train.failures import out_of_memory
from ftray.train.job import TrainJob


def train_worker(arguments: dict[str, TrainJob]) -> None:
    """Trains from the newest sound checkpoint to the end, or until a stop is asked for; all ranks run it.

    An FtrayError is one that trying again won't cure, and so is too little memory for a step: the driver is told.
    """
    job = arguments["job"]
    ray.get(job.monitor.join.remote(_place()))
    try:
        if not storage.exists(storage.join(job.run_dir, "run.json")):
            raise ConfigError(
                f"storage: {job.run_dir} is not to be seen from {socket.gethostname()}, where a worker runs; give a "
                "directory that all nodes share, or s3://…"
            )
        from ftray.train.setup import build_trainer

        build_trainer(job).train()
    except Exception as err:
        known = innermost(err)
        if isinstance(known, FtrayError):
            ray.get(job.monitor.fail.remote(type(known).__name__, str(known)))
        elif (sentence := out_of_memory(known)) is not None:
            ray.get(job.monitor.fail.remote("RunError", sentence))
        raise


def _place() -> WorkerLocation:
    context = ray.get_runtime_context()
    rank = ray.train.get_context().get_world_rank()
    return WorkerLocation(rank, context.get_node_id(), socket.gethostname(), os.getpid(), context.current_actor)
