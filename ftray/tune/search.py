"""Search algorithms: random, grid, and Optuna's TPE.

The values of a trial are a function of the seed, the trial's number and the trials before it. They are saved before the
trial starts, so a searcher has no other state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from ftray.config import TuneConfig, TuneParameter
from ftray.tune.space import Params, grid, has_optuna, in_order, is_on, number_of_trials, sample, tidy
from ftray.tune.state import TrialRecord

if TYPE_CHECKING:
    import optuna


def propose(tune: TuneConfig, trials: Sequence[TrialRecord]) -> Params:
    """Values for the next trial."""
    number = len(trials)
    if tune.search == "grid":
        return next(islice(grid(tune), number, None))
    if tune.search == "random":
        return sample(tune, number)
    import optuna

    # Each trial has its own sampler, so that its values do not depend on earlier calls in this process.
    seed = (tune.seed * 1_000_003 + number) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, 1 + number_of_trials(tune) // 3))
    study = make_study(tune, trials, sampler)
    suggestion, params = study.ask(), Params()
    for key in in_order(tune):
        if is_on(tune.space[key], params):
            params[key] = _suggest(suggestion, key, tune.space[key])
    return params


def _suggest(trial: optuna.Trial, key: str, parameter: TuneParameter) -> Any:
    if parameter.type == "choice":
        values = parameter.values or []
        return values[trial.suggest_categorical(key, list(range(len(values))))]
    assert parameter.low is not None  # `Parameter` asks for both
    assert parameter.high is not None
    if parameter.type == "randint":
        return trial.suggest_int(key, int(parameter.low), int(parameter.high))
    return tidy(trial.suggest_float(key, parameter.low, parameter.high, log=parameter.type == "loguniform"), parameter)


def make_study(
    tune: TuneConfig, trials: Sequence[TrialRecord], sampler: Any = None, share: float | None = None
) -> optuna.Study:
    """Converts the trials to an Optuna study. A choice is represented by its index.

    Args:
        tune: The sweep's settings.
        trials: All trials.
        sampler: Optuna sampler of the study.
        share: Compare trials by their loss at this share of their steps, instead of their best loss.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    states = optuna.trial.TrialState
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for trial in trials:
        value = trial.best.loss if trial.best else None
        state = {"done": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}.get(
            trial.status, states.RUNNING
        )
        if share is not None:
            value = next((r.loss for r in trial.reports if r.share >= share and math.isfinite(r.loss)), None)
            state = states.COMPLETE
        if state in (states.COMPLETE, states.PRUNED) and value is None:
            continue
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value if state == states.COMPLETE else None,
                params={key: _place(tune.space[key], chosen) for key, chosen in trial.params.items()},
                distributions={key: _distribution(tune.space[key]) for key in trial.params},
                intermediate_values={r.step: r.loss for r in trial.reports if math.isfinite(r.loss)},
            )
        )
    return study


def _place(parameter: TuneParameter, value: Any) -> Any:
    return (parameter.values or []).index(value) if parameter.type == "choice" else value


def _distribution(parameter: TuneParameter) -> Any:
    from optuna import distributions

    if parameter.type == "choice":
        return distributions.CategoricalDistribution(list(range(len(parameter.values or []))))
    low, high = parameter.low, parameter.high
    if parameter.type == "randint":
        return distributions.IntDistribution(int(low or 0), int(high or 0))
    return distributions.FloatDistribution(low or 0.0, high or 0.0, log=parameter.type == "loguniform")


def importance(tune: TuneConfig, trials: Sequence[TrialRecord]) -> tuple[float, dict[str, float]] | None:
    """Importance of each key for the eval loss by PED-ANOVA.

    Returns:
        The share of the steps at which trials are compared (the last that all of them reached), and the importance of each
        key (they sum to 1). None without Optuna or with fewer than four trials.
    """
    compared = [t for t in trials if t.status in ("done", "stopped") and t.best]
    if not has_optuna() or len(compared) < 4:
        return None
    import optuna

    share = min(t.reports[-1].share for t in compared)
    study = make_study(tune, compared, share=share)
    common = set.intersection(*(set(t.params) for t in compared))
    varied = [key for key in common if len({repr(t.params[key]) for t in compared}) > 1]
    if not varied:
        return None
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    try:
        importances = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
    except (ValueError, RuntimeError):  # all losses are equal
        return None
    return share, {key: float(value) for key, value in importances.items() if math.isfinite(value)} or {}
