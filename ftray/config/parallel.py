"""The section `scale`: number and kind of workers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ftray.config.base import Float, Int, Positive, Section


class WorkerRange(Section):
    """Range of the number of workers: the largest number that the cluster can place and that divides the global batch."""

    min: Positive
    """Minimum; with fewer free resources the run waits."""
    max: Positive
    """Maximum."""

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min}); raise it")
        return self


class ScaleConfig(Section):
    """Number and kind of workers. Changes the result only by rounding."""

    num_workers: Positive | WorkerRange = 1
    """Training workers: one per GPU, or one process each on CPU. With `{min: 2, max: 16}` a run shrinks after a loss
    and grows when resources appear."""
    accelerator: str | None = None
    """GPU type as Ray names it (A100, H100, …). Default: any GPU if the cluster has one, otherwise CPU."""
    cpus_per_worker: Annotated[Float, Field(gt=0)] = 1.0
    """CPUs reserved per training worker; on a CPU cluster also its number of threads."""
    gpus_per_worker: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Share of a GPU per worker. Below 1, several single-worker trials of a sweep share a GPU and its memory."""
    max_failures: Annotated[Int, Field(ge=0)] = 3
    """Restarts after failures without a new checkpoint in between; one more failure ends the run."""
    price_per_hour: Annotated[Float, Field(gt=0)] | None = None
    """Price of one worker hour (a GPU with its share of the node), for cost estimates."""
    wait_s: Annotated[Float, Field(ge=0)] = 1800.0
    """Seconds that a run without enough nodes waits before it ends with exit code 75."""

    @model_validator(mode="after")
    def _shares_alone(self) -> ScaleConfig:
        if self.gpus_per_worker < 1 and self.max_workers > 1:
            raise ValueError(
                f"gpus_per_worker ({self.gpus_per_worker:g}) needs num_workers 1, because two workers of a run can't share a GPU"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Minimum number of workers."""
        return self.num_workers.min if isinstance(self.num_workers, WorkerRange) else self.num_workers

    @property
    def max_workers(self) -> int:
        """Maximum number of workers."""
        return self.num_workers.max if isinstance(self.num_workers, WorkerRange) else self.num_workers
