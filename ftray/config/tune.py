"""The section `tune`: search space, search algorithm, early stopping of trials."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ftray.config.base import Float, Int, Positive, Section


class TuneParameter(Section):
    """A key of the run file that trials set to different values."""

    type: Literal["choice", "uniform", "loguniform", "randint"]
    """`choice`: one of `values`; `uniform`, `loguniform`: a number from `low` to `high`; `randint`: an integer."""
    values: list[Any] | None = Field(None, min_length=1)
    """For `choice`: the values."""
    low: Float | None = None
    """Lowest value, inclusive."""
    high: Float | None = None
    """Highest value, inclusive."""
    when: dict[str, Any] | None = Field(None, min_length=1)
    """Only if other keys of the space have these values, for example `{method.type: lora}`; a list means one of them."""

    @model_validator(mode="after")
    def _type_fits(self) -> TuneParameter:
        low, high = self.low, self.high
        if self.type == "choice":
            if self.values is None or low is not None or high is not None:
                raise ValueError("is a choice: set values: [ … ], and neither low nor high")
            if any(value in self.values[:place] for place, value in enumerate(self.values)):
                raise ValueError("lists a value twice; remove one")
            return self
        if low is None or high is None or self.values is not None:
            raise ValueError(f"is {self.type}: set low and high, and no values")
        if not low < high:
            raise ValueError(f"has low {low:g} and high {high:g}; low must be below high")
        if self.type == "loguniform" and low <= 0:
            raise ValueError(f"is loguniform with low {low:g}; low must be above 0")
        if self.type == "randint" and (low != int(low) or high != int(high)):
            raise ValueError("is randint: low and high must be whole numbers")
        return self


class TuneConfig(Section):
    """A hyperparameter sweep: `ftray tune` trains the run with different settings and reports the best."""

    space: dict[str, TuneParameter] = Field(min_length=1)
    """Dotted keys of `method`, `train`, `deepspeed` (with `own_data` also `model` and `data`) and the values to try:
    `{train.learning_rate: {type: loguniform, low: 5e-5, high: 5e-4}}`."""
    num_trials: Positive | None = None
    """Number of trials; can be raised later. Default for a grid: all its points."""
    search: Literal["random", "optuna", "grid"] = "random"
    """Search algorithm: random; Optuna's TPE (`pip install ftray[tune]`); or a grid of all combinations of choices."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Early stopping of trials: asynchronous successive halving, the median rule, or none."""
    grace: Annotated[Float, Field(gt=0, le=1)] = 0.1
    """Share of the steps that every trial gets before it can be stopped."""
    reduction_factor: Annotated[Float, Field(gt=1)] = 3.0
    """For `asha`: one of this many trials continues at each rung; rungs are at grace, grace × factor, grace × factor²,
    …"""
    metric: Literal["eval_loss"] = "eval_loss"
    """Metric that trials are compared by, measured every `evaluate.every` steps (default: ten times per trial)."""
    max_concurrent: Positive | None = None
    """Trials that train at once. Default: as many as the cluster can place."""
    own_data: bool = False
    """Allow keys of `model` and `data` in the space. Each trial then reads and indexes its own data; otherwise the
    trials share one index."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Seed of the search; training uses train.seed."""

    @field_validator("space")
    @classmethod
    def _conditions_end(cls, space: dict[str, TuneParameter]) -> dict[str, TuneParameter]:
        """Checks that conditions refer to keys of the space and have no cycle."""
        settled: set[str] = set()
        for key, parameter in space.items():
            for other in parameter.when or {}:
                if other not in space:
                    raise ValueError(
                        f"makes {key} depend on {other}, which is not in the space; add {other}, or remove `when`"
                    )
        while more := {key for key, p in space.items() if key not in settled and settled.issuperset(p.when or {})}:
            settled |= more
        if left := sorted(space.keys() - settled):
            raise ValueError(f"has a cycle of conditions: {', '.join(left)}; remove a `when`")
        return space

    @model_validator(mode="after")
    def _number_is_known(self) -> TuneConfig:
        if self.search == "grid":
            if ranges := [k for k, p in self.space.items() if p.type not in ("choice", "randint")]:
                raise ValueError(f"space.{ranges[0]} is a range, but search grid needs choices; make it a choice")
        elif self.num_trials is None:
            raise ValueError("num_trials is missing; add it, for example 8")
        return self
