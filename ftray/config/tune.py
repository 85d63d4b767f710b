"""The section `tune`: which settings are tried, how they are chosen, and when a trial is given up."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ftray.config.base import Float, Int, Positive, Section


class TuneParameter(Section):
    """A key of the run file that trials set to different values."""

    type: Literal["choice", "uniform", "loguniform", "randint"]
    """`choice`: one of `values`; `uniform`, `loguniform`: a number from `low` to `high`; `randint`: a whole one."""
    values: list[Any] | None = Field(None, min_length=1)
    """For `choice`: the values."""
    low: Float | None = None
    """Lowest number, itself included."""
    high: Float | None = None
    """Highest number, itself included."""
    when: dict[str, Any] | None = Field(None, min_length=1)
    """Only where other keys of the space have these values, e.g. `{method.type: lora}`; a list: one of them."""

    @model_validator(mode="after")
    def _type_fits(self) -> TuneParameter:
        low, high = self.low, self.high
        if self.type == "choice":
            if self.values is None or low is not None or high is not None:
                raise ValueError("is a choice: give it values: [ … ], and neither low nor high")
            if any(value in self.values[:place] for place, value in enumerate(self.values)):
                raise ValueError("names a value twice; name each once")
            return self
        if low is None or high is None or self.values is not None:
            raise ValueError(f"is {self.type}: give it low and high, and no values")
        if not low < high:
            raise ValueError(f"goes from low {low:g} to high {high:g}; low must be below high")
        if self.type == "loguniform" and low <= 0:
            raise ValueError(f"is loguniform with low {low:g}; low must be above 0")
        if self.type == "randint" and (low != int(low) or high != int(high)):
            raise ValueError("is randint: low and high must be whole numbers")
        return self


class TuneConfig(Section):
    """A sweep: `ftray tune` trains the run with different settings and says which are best."""

    space: dict[str, TuneParameter] = Field(min_length=1)
    """Dotted keys of `method`, `train`, `deepspeed` (of `model` and `data` under `own_data`), and where their values
    come from: `{train.learning_rate: {type: loguniform, low: 5e-5, high: 5e-4}}`."""
    num_trials: Positive | None = None
    """Trials in all; may be raised later. A grid, where it is left out, has all its points."""
    search: Literal["random", "optuna", "grid"] = "random"
    """How values are chosen: at random; by Optuna's TPE, from the trials before (needs `pip install ftray[tune]`); or every
    combination of choices."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """What gives trials up early: asynchronous successive halving, the median of the others, or nothing."""
    grace: Annotated[Float, Field(gt=0, le=1)] = 0.1
    """Share of its steps that every trial gets before it may be given up."""
    reduction_factor: Annotated[Float, Field(gt=1)] = 3.0
    """For `asha`: of so many trials one goes on at a rung; rungs are at grace, grace × factor, grace × factor², …"""
    metric: Literal["eval_loss"] = "eval_loss"
    """What trials are compared by; taken every `evaluate.every` steps (left out: ten times in a trial)."""
    max_concurrent: Positive | None = None
    """Trials that train at once; left out: as many as the cluster has room for."""
    own_data: bool = False
    """Let the space hold keys of `model` and `data`. Each trial then reads and indexes its own data; otherwise that
    happens once for all."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Seeds the choice of values; that of training is train.seed."""

    @field_validator("space")
    @classmethod
    def _conditions_end(cls, space: dict[str, TuneParameter]) -> dict[str, TuneParameter]:
        """Each condition names keys of the space, and none waits for itself."""
        settled: set[str] = set()
        for key, parameter in space.items():
            for other in parameter.when or {}:
                if other not in space:
                    raise ValueError(
                        f"makes {key} depend on {other}, which is not in the space; add it or remove `when`"
                    )
        while more := {key for key, p in space.items() if key not in settled and settled.issuperset(p.when or {})}:
            settled |= more
        if left := sorted(space.keys() - settled):
            raise ValueError(f"has keys that depend on each other in a circle: {', '.join(left)}; remove a `when`")
        return space

    @model_validator(mode="after")
    def _number_is_known(self) -> TuneConfig:
        if self.search == "grid":
            if ranges := [k for k, p in self.space.items() if p.type not in ("choice", "randint")]:
                raise ValueError(f"space.{ranges[0]} is a range, and search grid tries every value; make it a choice")
        elif self.num_trials is None:
            raise ValueError("num_trials is missing; say how many trials there are, for example 8")
        return self
