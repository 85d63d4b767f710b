"""The section `scale`: how many workers, and on what."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ftray.config.base import Float, Int, Positive, Section


class WorkerRange(Section):
    """From how many to how many workers: as many as the cluster has room for and the global batch can be divided by."""

    min: Positive
    """Fewest workers; with room for less the run waits."""
    max: Positive
    """Most workers."""

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min}); raise it")
        return self


class ScaleConfig(Section):
    """How many workers; never changes the result beyond rounding."""

    num_workers: Positive | WorkerRange = 1
    """Training workers: one a GPU, or one a process on CPU. `{min: 2, max: 16}`: fewer after a loss, more when they appear."""
    accelerator: str | None = None
    """GPU kind as Ray names it (A100, H100, …); left out: any GPU where the cluster has one, else CPU."""
    cpus_per_worker: Annotated[Float, Field(gt=0)] = 1.0
    """CPUs a training worker reserves; on a CPU cluster also its number of threads."""
    gpus_per_worker: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Share of a GPU that a worker takes. Below 1 several trials of a sweep, of one worker each, share a GPU and its memory."""
    max_failures: Annotated[Int, Field(ge=0)] = 3
    """Failures in a row, without a new checkpoint between them, after which workers are started anew; one more ends the run."""
    price_per_hour: Annotated[Float, Field(gt=0)] | None = None
    """Price of an hour of one worker (a GPU with its share of the node), for what a run costs."""
    wait_s: Annotated[Float, Field(ge=0)] = 1800.0
    """Seconds that a run which lost nodes waits for room for its workers before it ends with exit code 75."""

    @model_validator(mode="after")
    def _shares_alone(self) -> ScaleConfig:
        if self.gpus_per_worker < 1 and self.max_workers > 1:
            raise ValueError(
                f"gpus_per_worker ({self.gpus_per_worker:g}) needs num_workers 1: two workers of a run can't talk on one GPU"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Fewest workers."""
        return self.num_workers.min if isinstance(self.num_workers, WorkerRange) else self.num_workers

    @property
    def max_workers(self) -> int:
        """Most workers."""
        return self.num_workers.max if isinstance(self.num_workers, WorkerRange) else self.num_workers
