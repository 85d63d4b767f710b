"""Objectives: what a run minimizes. Start with `base`; `sft` holds the cross-entropy loss.

Importing the package registers the objectives.
"""

from __future__ import annotations

from ftray import config
from ftray.train.objectives import prompt_tuning, sft  # noqa: F401 - they register themselves
from ftray.train.objectives.base import Objective, objective_type


def objective_of(run: config.RunConfig) -> Objective:
    """The objective of a run, with its settings."""
    return objective_type("prompt-tuning" if run.method.type == "prompt-tuning" else "sft").from_config(run)
