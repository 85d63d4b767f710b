"""The search space: which values a trial can have, and the run that results from them. Pure: no Ray, no storage.

The run of a trial passes the same validation as a run file.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any

from ftray import config
from ftray.config import TuneConfig, TuneParameter
from ftray.config.loader import Schema, parse_yaml, put_value
from ftray.errors import ConfigError
from ftray.train.zero.config import deepspeed_config

SECTIONS = ("method", "train", "deepspeed")
OWN_DATA = ("model", "data")
MAX_CORNERS = 1000
MAX_LISTED = 32  # longer integer ranges are represented by both ends and the middle
Params = dict[str, Any]


def check_tune(run: config.RunConfig) -> TuneConfig:
    """Validates the tune section and the run of every corner of its space.

    Raises:
        ConfigError: A key is unknown or cannot be tuned, a combination of values is invalid, the run has no eval set, or
            the search algorithm is not installed.
    """
    tune = _section(run)
    if run.data.eval is None:
        raise ConfigError(
            f"tune.metric {tune.metric} needs an eval set, but data.eval is missing; add data.eval: {{fraction: 0.1}}"
        )
    schema = Schema(config.RunConfig)
    for key in tune.space:
        _check_key(key, tune, schema)
    if not shares_data(tune) and run.evaluate.every is None:
        raise ConfigError("tune.space changes the data of trials, so evaluate.every has no default; set it")
    for params in corners(tune):
        made = trial_run(run, params, "trial", run.storage)
        deepspeed_config(made.train, made.deepspeed, made.micro_batch_size, made.world_sizes[0])
    if tune.search == "optuna" and not has_optuna():
        raise ConfigError("tune.search optuna is not installed; pip install 'ftray[tune]', or use random")
    return tune


def has_optuna() -> bool:
    """Whether Optuna is installed."""
    return importlib.util.find_spec("optuna") is not None


def number_of_trials(tune: TuneConfig) -> int:
    """Total number of trials."""
    if tune.search != "grid":
        assert tune.num_trials is not None  # `TuneConfig` validates it
        return tune.num_trials
    return sum(1 for _ in islice(grid(tune), tune.num_trials))


def describe(tune: TuneConfig) -> str:
    """One-line description of a sweep."""
    early = {"asha": "early stopping by successive halving", "median": "early stopping by the median rule"}
    return (
        f"{number_of_trials(tune)} trials ({tune.search}) over {', '.join(tune.space)}; "
        f"{early.get(tune.scheduler, 'no early stopping')}"
    )


def _section(run: config.RunConfig) -> TuneConfig:
    if run.tune is None:
        raise ConfigError(
            "the section tune is missing; add it, for example "
            "tune: {num_trials: 8, space: {train.learning_rate: {type: loguniform, low: 5e-5, high: 5e-4}}}"
        )
    return run.tune


def _check_key(key: str, tune: TuneConfig, schema: Schema) -> None:
    parts = key.split(".")
    plain, known = ".".join(part for part in parts if not part.isdecimal()), set(schema.known())
    if plain not in known and not plain.startswith("deepspeed.overrides."):
        raise ConfigError(f"tune.space: unknown key {key}; {schema.closest(parts)}")
    if parts[0] not in (*SECTIONS, *OWN_DATA):
        raise ConfigError(f"tune.space: {key} does not affect training; use keys of {', '.join(SECTIONS)}")
    if any(other.startswith(f"{plain}.") for other in known):
        raise ConfigError(f"tune.space: {key} is a section; name one of its keys")
    if parts[0] in OWN_DATA and not tune.own_data:
        raise ConfigError(
            f"tune.space: {key} changes the data, but trials share one index; set tune.own_data: true, or remove the key"
        )


def shares_data(tune: TuneConfig) -> bool:
    """Whether all trials train on the same data."""
    return not any(key.split(".")[0] in OWN_DATA for key in tune.space)


def trial_run(run: config.RunConfig, params: Mapping[str, Any], name: str, storage: str) -> config.RunConfig:
    """The run of a trial: the run file with these values, on the smallest number of workers it allows.

    Raises:
        ConfigError: The values make no valid run. The message names them.
    """
    tree = run.model_dump(mode="json", exclude_unset=True, exclude={"tune"})
    tree |= {"name": name, "storage": storage}
    try:
        for key, value in params.items():
            put_value(tree, key, value)
        made = config.parse_run(tree, "")
    except ConfigError as err:
        reason = " ".join(str(err).removeprefix(":").split())
        named = {key: value for key, value in params.items() if key in reason} or params
        raise ConfigError(f"tune.space with {as_words(named)}: {reason}") from None
    scale = made.scale.model_copy(update={"num_workers": made.world_sizes[-1]})
    return made.model_copy(update={"scale": scale})


def as_words(params: Mapping[str, Any]) -> str:
    """Values with their keys, for messages."""
    return ", ".join(f"{key}={as_word(value)}" for key, value in params.items())


def as_word(value: Any) -> str:
    """A value in the syntax of an override."""
    try:
        if isinstance(value, str) and parse_yaml(value, "") == value:
            return value
    except ConfigError:
        pass
    return json.dumps(value)


def in_order(tune: TuneConfig) -> list[str]:
    """Keys of the space, each after the keys in its `when`."""
    order: list[str] = []
    while len(order) < len(tune.space):
        order += [k for k, p in tune.space.items() if k not in order and set(p.when or {}) <= set(order)]
    return order


def is_on(parameter: TuneParameter, params: Mapping[str, Any]) -> bool:
    """Whether the `when` of a key holds for the values chosen so far."""
    for key, wanted in (parameter.when or {}).items():
        if key not in params or params[key] not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def sample(tune: TuneConfig, number: int) -> Params:
    """Random values of trial `number`, a function of seed, number and key."""
    params: Params = {}
    for key in in_order(tune):
        if is_on(tune.space[key], params):
            params[key] = _draw(tune.space[key], random.Random(f"{tune.seed}/{number}/{key}"))
    return params


def _draw(parameter: TuneParameter, rng: random.Random) -> Any:
    if parameter.type == "choice":
        return rng.choice(parameter.values or [])
    low, high = _ends(parameter)
    if parameter.type == "randint":
        return rng.randint(int(low), int(high))
    if parameter.type == "loguniform":
        return tidy(math.exp(rng.uniform(math.log(low), math.log(high))), parameter)
    return tidy(rng.uniform(low, high), parameter)


def tidy(number: float, parameter: TuneParameter) -> float:
    """Rounds a number to four digits, within its range."""
    low, high = _ends(parameter)
    return min(high, max(low, float(f"{number:.4g}")))


def grid(tune: TuneConfig) -> Iterator[Params]:
    """Every combination of values; the last key changes fastest."""
    return _combinations(tune, {key: _all_values(parameter) for key, parameter in tune.space.items()})


def corners(tune: TuneConfig) -> Iterator[Params]:
    """Combinations of all choices and both ends of all ranges. If there are too many, a sample with each value in it."""
    values = {key: _corner_values(parameter) for key, parameter in tune.space.items()}
    if math.prod(map(len, values.values())) <= MAX_CORNERS:
        yield from _combinations(tune, values)
        return
    for key in in_order(tune):
        for value in values[key]:
            yield from islice(_combinations(tune, {**values, **_switched_on(tune, key), key: [value]}), 1)
    rng = random.Random(0)
    for _ in range(MAX_CORNERS):
        picked = {key: [rng.choice(of)] for key, of in values.items()}
        yield from _combinations(tune, picked)


def _switched_on(tune: TuneConfig, key: str) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for other, wanted in (tune.space[key].when or {}).items():
        values |= {**_switched_on(tune, other), other: wanted if isinstance(wanted, list) else [wanted]}
    return values


def _combinations(tune: TuneConfig, values: Mapping[str, list[Any]]) -> Iterator[Params]:
    keys, unique = in_order(tune), set()
    is_conditional = any(parameter.when for parameter in tune.space.values())
    for combination in product(*(values[key] for key in keys)):
        params: Params = {}
        for key, value in zip(keys, combination, strict=True):
            if is_on(tune.space[key], params):
                params[key] = value
        if is_conditional:  # combinations that differ only in unused keys are equal
            text = json.dumps(params, sort_keys=True)
            if text in unique:
                continue
            unique.add(text)
        yield params


def _all_values(parameter: TuneParameter) -> list[Any]:
    if parameter.type == "choice":
        return list(parameter.values or [])
    low, high = _ends(parameter)
    return list(range(int(low), int(high) + 1))


def _corner_values(parameter: TuneParameter) -> list[Any]:
    if parameter.type == "choice":
        return list(parameter.values or [])
    low, high = _ends(parameter)
    if parameter.type != "randint":
        return [low, high]
    if high - low < MAX_LISTED:
        return _all_values(parameter)
    return [int(low), int(low + high) // 2, int(high)]


def _ends(parameter: TuneParameter) -> tuple[float, float]:
    assert parameter.low is not None  # `TuneParameter` validates both
    assert parameter.high is not None
    return parameter.low, parameter.high
