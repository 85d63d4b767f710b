"""Reads and writes evaluate/results.json and generations.jsonl. Needs neither models nor Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ftray import config, storage
from ftray.errors import ConfigError, GateError
from ftray.evaluate.stats import Difference


@dataclass(frozen=True)
class Generation:
    """A question of the eval set with the reference answer and the answers of base and tuned model.

    Attributes:
        slice: Value of the slice column, or an empty string.
    """

    question: str
    reference: str
    base: str
    tuned: str
    slice: str = ""


def read_generations(run_dir: str) -> list[Generation]:
    """All answers of a run, in the order of the questions.

    Raises:
        ConfigError: There are no answers yet, or the file is damaged.
        StorageError: Storage does not answer.
    """
    uri = storage.join(run_dir, "evaluate", "generations.jsonl")
    remedy = "run `ftray evaluate` first, with a metric that needs answers (rouge or format)"
    try:
        lines = [storage.parse_object(line) for line in storage.read_bytes(uri).splitlines() if line.strip()]
        generations = [_generation(line) for line in lines]
    except storage.MissingFile:
        raise ConfigError(f"{uri} is missing, so there are no answers to compare; {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{uri} is damaged; delete it together with results.json, then run `ftray evaluate`"
        ) from None
    if not generations:
        raise ConfigError(f"{uri} is empty, so there are no answers to compare; {remedy}")
    return generations


def _generation(line: dict[str, Any]) -> Generation:
    name = line.get("slice")
    return Generation(
        str(line["question"]),
        str(line.get("reference") or ""),
        str(line["base"]),
        str(line["tuned"]),
        "" if name is None else str(name),
    )


_SETTINGS = {
    "metrics",
    "format",
    "extract",
    "json_schema",
    "bertscore_model",
    "general",
    "few_shot",
    "slices",
    "pairs",
    "num_examples",
    "num_generations",
    "max_new_tokens",
}


_LIMITS = {
    "min_gain": ("gained", "but needs at least"),
    "max_rise": ("rose by", "but may rise by at most"),
    "max_drop": ("fell by", "but may fall by at most"),
    "min": ("is", "but must be at least"),
    "max": ("is", "but must be at most"),
}


@dataclass(frozen=True)
class ModelScores:
    """Metrics of one model (see `config.FIGURES`); None if a metric is not configured.

    Loss (in nats), perplexity and token accuracy are over num_trained_tokens tokens of num_examples examples of the eval set.
    general_loss is over the general set, and all other metrics are over num_answers answers.
    """

    num_trained_tokens: int
    num_examples: int
    num_answers: int
    loss: float
    perplexity: float
    token_accuracy: float
    rouge_1: float | None = None
    rouge_2: float | None = None
    rouge_l: float | None = None
    bleu: float | None = None
    chrf: float | None = None
    bertscore: float | None = None
    exact_match: float | None = None
    extracted_match: float | None = None
    format: float | None = None
    json_valid: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    general_loss: float | None = None

    def figure(self, name: str) -> float | None:
        """A metric by its name."""
        value: float | None = getattr(self, name)
        return value


@dataclass(frozen=True)
class GateResult:
    """The result of one limit of a gate. value: the gain, rise, drop or value; None if the metric was not computed."""

    figure: str
    limit: str
    wanted: float
    value: float | None
    passed: bool

    def __str__(self) -> str:
        did, wants = _LIMITS[self.limit]
        if self.value is None:
            return f"{self.figure} was not computed, {wants} {self.wanted:g} ({self.limit})"
        return f"{self.figure} {did} {self.value:.4g}, {wants} {self.wanted:g} ({self.limit})"


@dataclass(frozen=True)
class Comparison:
    """The comparison of tuned model, base, and optionally the base with few-shot prompts.

    Attributes:
        differences: "tuned - base", "few_shot - base", "tuned - few_shot" → metric → difference.
        slices: The column, its groups and the spread between them.
        classes: Table of labels of each model.
    """

    step: int
    config_hash: str
    settings: dict[str, Any]
    base: ModelScores
    tuned: ModelScores
    few_shot: ModelScores | None
    differences: dict[str, dict[str, Difference]]
    verdict: list[str]
    gates: list[GateResult]
    slices: dict[str, Any] | None = None
    classes: dict[str, Any] | None = None
    pairs: dict[str, Any] | None = None

    @property
    def models(self) -> dict[str, ModelScores]:
        """Scores by model, in the order of the table."""
        return {"base": self.base, **({"few_shot": self.few_shot} if self.few_shot else {}), "tuned": self.tuned}

    @property
    def missed(self) -> list[GateResult]:
        """The limits that the tuned model does not meet."""
        return [gate for gate in self.gates if not gate.passed]

    def check_gates(self) -> None:
        """Raises GateError (exit code 3: do not publish) if the model does not meet a limit."""
        if self.missed:
            raise GateError(
                f"the gates reject this model: {'; '.join(map(str, self.missed))}. The model is kept, but do not publish "
                "it; train it differently, or change evaluate.gates"
            )


def settings_of(run: config.RunConfig) -> dict[str, Any]:
    """The settings that affect the results, besides the run's identity."""
    return run.evaluate.model_dump(mode="json", include=_SETTINGS)


def read_results(run_dir: str, warn: Callable[[str], None] | None = None) -> Comparison | None:
    """The last comparison of a run; None if there is none. `warn` receives a message if it cannot be read."""
    uri = storage.join(run_dir, "evaluate", "results.json")
    try:
        tree = storage.find_object(uri)
        return None if tree is None else storage.parse_as(Comparison, tree)
    except (storage.DamagedFile, ValueError) as err:  # damaged, or another version's
        if warn is not None:
            warn(f"cannot read {uri} ({err}); run ftray evaluate to write it again")
        return None


def known_results(run: config.RunConfig, run_dir: str, step: int) -> Comparison | None:
    """The comparison of this checkpoint with these settings and the current gates, if it exists."""
    known = read_results(run_dir)
    if known is None or (known.step, known.settings) != (step, settings_of(run)):
        return None
    return with_gates(known, run.evaluate.gates)


def write_results(comparison: Comparison, run_dir: str) -> None:
    """Writes evaluate/results.json."""
    text = json.dumps(asdict(comparison), indent=1, ensure_ascii=False)
    storage.write_bytes(storage.join(run_dir, "evaluate", "results.json"), text.encode(), private=True)


def with_gates(comparison: Comparison, gates: Mapping[str, config.Gate]) -> Comparison:
    """The comparison with the results of these gates."""
    return replace(comparison, gates=judge(gates, comparison.base, comparison.tuned))


def judge(gates: Mapping[str, config.Gate], base: ModelScores, tuned: ModelScores) -> list[GateResult]:
    """Checks each limit of each gate, in order. A metric that is missing or not a number does not meet its limit."""
    return [
        _judge(name, limit, wanted, base.figure(name), tuned.figure(name))
        for name, gate in gates.items()
        for limit, wanted in gate.limits.items()
    ]


def _judge(name: str, limit: str, wanted: float, base: float | None, tuned: float | None) -> GateResult:
    if base is None or tuned is None:
        return GateResult(name, limit, wanted, None, False)
    value = {
        "min_gain": tuned - base if config.FIGURES[name].higher_is_better else base - tuned,
        "max_rise": tuned - base,
        "max_drop": base - tuned,
        "min": tuned,
        "max": tuned,
    }[limit]
    slack = 1e-9  # 0.3 - 0.1 is less than 0.2
    passed = value >= wanted - slack if limit in ("min_gain", "min") else value <= wanted + slack
    return GateResult(name, limit, wanted, value, passed)
