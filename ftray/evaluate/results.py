"""What `evaluate/results.json` holds, and how it is read and written. No models, no Ray: serving and reports read it."""

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
    """A held-out question, its reference answer, and what base and tuned model answered. slice: "" where there is none."""

    question: str
    reference: str
    base: str
    tuned: str
    slice: str = ""


def read_generations(run_dir: str) -> list[Generation]:
    """All answers of a run, in the order of their questions.

    Raises ConfigError when there are none yet, StorageError.
    """
    uri = storage.join(run_dir, "evaluate", "generations.jsonl")
    remedy = "run `ftray evaluate` first, with a metric that needs answers (rouge or format)"
    try:
        lines = [storage.parse_object(line) for line in storage.read_bytes(uri).splitlines() if line.strip()]
        found = [_generation(line) for line in lines]
    except storage.MissingFile:
        raise ConfigError(f"{uri} is missing, so there are no answers to compare; {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{uri} is damaged; delete it together with results.json, then run `ftray evaluate`"
        ) from None
    if not found:
        raise ConfigError(f"{uri} is empty, so there are no answers to compare; {remedy}")
    return found


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
    "min_gain": ("gained", "wanted is at least"),
    "max_rise": ("rose by", "allowed is at most"),
    "max_drop": ("fell by", "allowed is at most"),
    "min": ("is", "wanted is at least"),
    "max": ("is", "allowed is at most"),
}


@dataclass(frozen=True)
class ModelScores:
    """One model's figures (see `config.FIGURES`), None for what wasn't asked for.

    Loss, perplexity and token accuracy are over num_trained_tokens tokens of num_examples held-out records; loss in nats.
    The rest is over num_answers answers, general_loss over the general set.
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
        """A figure by its name."""
        value: float | None = getattr(self, name)
        return value


@dataclass(frozen=True)
class GateResult:
    """One limit of a gate. found: what is compared with it: a gain, rise, drop, or the figure; None: not computed."""

    figure: str
    limit: str
    wanted: float
    found: float | None
    passed: bool

    def __str__(self) -> str:
        did, wants = _LIMITS[self.limit]
        if self.found is None:
            return f"{self.figure} was not computed, {wants} {self.wanted:g} ({self.limit})"
        return f"{self.figure} {did} {self.found:.4g}, {wants} {self.wanted:g} ({self.limit})"


@dataclass(frozen=True)
class Comparison:
    """Base and tuned model side by side, and the base with examples in its prompt where that was asked for.

    differences: "tuned - base", "few_shot - base", "tuned - few_shot" → figure → difference. slices: the column, its
    groups and how far they are apart. classes: of each model, the table of its labels.
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
        """The limits that the tuned model misses."""
        return [gate for gate in self.gates if not gate.passed]

    def check_gates(self) -> None:
        """Raises GateError, whose exit code says that the model is not to be published, if it misses a limit."""
        if self.missed:
            raise GateError(
                f"the gates refuse this model, which is kept but not to be published: {'; '.join(map(str, self.missed))}; "
                "train it otherwise, or change evaluate.gates"
            )


def settings_of(run: config.RunConfig) -> dict[str, Any]:
    """What the figures depend on besides the run's identity."""
    return run.evaluate.model_dump(mode="json", include=_SETTINGS)


def read_results(run_dir: str, warn: Callable[[str], None] | None = None) -> Comparison | None:
    """The last comparison of a run, if there is one that this version can read. warn: told of one that can't be."""
    uri = storage.join(run_dir, "evaluate", "results.json")
    try:
        tree = storage.find_object(uri)
        return None if tree is None else storage.parse_as(Comparison, tree)
    except (storage.DamagedFile, ValueError) as err:  # damaged, or another version's
        if warn is not None:
            warn(f"{uri} can't be read ({err}); ftray evaluate makes it anew")
        return None


def known_results(run: config.RunConfig, run_dir: str, step: int) -> Comparison | None:
    """The comparison of this checkpoint by these settings, if there is one; its gates are the run file's as it is now."""
    known = read_results(run_dir)
    if known is None or (known.step, known.settings) != (step, settings_of(run)):
        return None
    return with_gates(known, run.evaluate.gates)


def write_results(comparison: Comparison, run_dir: str) -> None:
    """Writes evaluate/results.json."""
    text = json.dumps(asdict(comparison), indent=1, ensure_ascii=False)
    storage.write_bytes(storage.join(run_dir, "evaluate", "results.json"), text.encode(), private=True)


def with_gates(comparison: Comparison, gates: Mapping[str, config.Gate]) -> Comparison:
    """The comparison, judged by these gates."""
    return replace(comparison, gates=judge(gates, comparison.base, comparison.tuned))


def judge(gates: Mapping[str, config.Gate], base: ModelScores, tuned: ModelScores) -> list[GateResult]:
    """Each limit of each gate, in their order. What wasn't computed, or is no number, misses its limit."""
    return [
        _judge(name, limit, wanted, base.figure(name), tuned.figure(name))
        for name, gate in gates.items()
        for limit, wanted in gate.limits.items()
    ]


def _judge(name: str, limit: str, wanted: float, base: float | None, tuned: float | None) -> GateResult:
    if base is None or tuned is None:
        return GateResult(name, limit, wanted, None, False)
    found = {
        "min_gain": tuned - base if config.FIGURES[name].higher_is_better else base - tuned,
        "max_rise": tuned - base,
        "max_drop": base - tuned,
        "min": tuned,
        "max": tuned,
    }[limit]
    slack = 1e-9  # 0.3 - 0.1 is a little less than 0.2
    passed = found >= wanted - slack if limit in ("min_gain", "min") else found <= wanted + slack
    return GateResult(name, limit, wanted, found, passed)
