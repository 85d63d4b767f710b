"""The section `tracking`: experiment trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ftray.config.base import Section


class TrackingConfig(Section):
    """Experiment trackers."""

    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field([])
    """Where the lines of `metrics.jsonl` are also sent, at each checkpoint. Each tracker needs `pip install ftray[<its
    name>]`. MLflow and Weights & Biases are configured by their own environment variables; by default they write to
    the run's directory and need no network ([trackers](trackers.md))."""

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("lists a tracker twice; remove one")
        return value
