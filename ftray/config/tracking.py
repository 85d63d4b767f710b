"""The section of who else is told how a run goes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ftray.config.base import Section


class TrackingConfig(Section):
    """Who else is told how a run goes."""

    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field([])
    """Where the lines of `metrics.jsonl` go, too, at each checkpoint; each needs `pip install ftray[<its name>]`. MLflow and
    Weights & Biases are set up by their own environment variables; without any they write to the run's directory and need no
    network ([trackers](trackers.md))."""

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("names a tracker twice; name each once")
        return value
