"""The description of a training job that the driver sends to its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftray import config, storage


@dataclass(frozen=True)
class TrainJob:
    """What the driver gives each worker.

    Attributes:
        run: The run's configuration.
        run_dir: The run's directory, absolute.
        meta: Hashes and versions, kept in each checkpoint.
        heldout: Reference to the table of eval sequences, or None.
        monitor: Handle of the driver channel's actor.
        parent: The checkpoint whose weights a new run starts from, or None.
        lease: The driver's right to write the run.
        waits: Whether training waits after each eval loss until the driver has decided if the trial goes on.
    """

    run: config.RunConfig
    run_dir: str
    meta: dict[str, Any]
    heldout: Any
    monitor: Any
    parent: str | None = None
    lease: storage.Token | None = None
    waits: bool = False
