"""The section `evaluate`: metrics, gates, human evaluation, judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ftray.config.base import Float, Int, Positive, Section, defaults

Metric = Literal[
    "loss", "rouge", "bleu", "chrf", "bertscore", "exact", "extract", "format", "json", "classes", "general"
]


class Figure(NamedTuple):
    """A number that models are compared by. title: for tables. of: the entry of evaluate.metrics that computes it."""

    title: str
    of: Metric
    higher_is_better: bool = True


FIGURES: Mapping[str, Figure] = {
    "loss": Figure("eval loss", "loss", False),
    "perplexity": Figure("perplexity", "loss", False),
    "token_accuracy": Figure("token accuracy", "loss"),
    "rouge_1": Figure("ROUGE-1", "rouge"),
    "rouge_2": Figure("ROUGE-2", "rouge"),
    "rouge_l": Figure("ROUGE-L", "rouge"),
    "bleu": Figure("BLEU", "bleu"),
    "chrf": Figure("chrF", "chrf"),
    "bertscore": Figure("BERTScore", "bertscore"),
    "exact_match": Figure("exact match", "exact"),
    "extracted_match": Figure("extracted match", "extract"),
    "format": Figure("exact format", "format"),
    "json_valid": Figure("valid JSON", "json"),
    "accuracy": Figure("accuracy", "classes"),
    "macro_f1": Figure("macro F1", "classes"),
    "general_loss": Figure("general loss", "general", False),
}


class Gate(Section):
    """Limits of one metric, in its own unit. A value equal to the limit passes."""

    min_gain: Annotated[Float, Field(ge=0)] | None = None
    """Minimum improvement over the base: higher, or lower for losses."""
    max_rise: Annotated[Float, Field(ge=0)] | None = None
    """Maximum increase over the base."""
    max_drop: Annotated[Float, Field(ge=0)] | None = None
    """Maximum decrease below the base."""
    min: Float | None = None
    """Minimum of the metric itself."""
    max: Float | None = None
    """Maximum of the metric itself."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> Gate:
        if not self.limits:
            raise ValueError("is a gate without a limit; set min_gain, max_rise, max_drop, min or max")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        return {name: value for name, value in self if value is not None}


def wrong_gate(gates: Mapping[str, Gate], metrics: Sequence[str]) -> str | None:
    """A sentence about the first gate that these metrics can't decide, or None."""
    import difflib

    for name in gates:
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(FIGURES)}"
            return f"gates.{name} is not a metric; {remedy}"
        if FIGURES[name].of not in (*metrics, "loss"):
            return f"gates.{name} needs the metric '{FIGURES[name].of}', which is not computed; add it to metrics"
    return None


_CRITERIA = ["accuracy", "relevance", "quality", "style", "safety"]


_Criterion = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9 _-]{0,29}$")]


class HumanEvalConfig(Section):
    """The blinded sheet of `ftray evaluate human`."""

    samples: Positive = 100
    """Questions on the sheet, distributed over the slices. At most as many as both models have answered
    (`num_generations`)."""
    criteria: list[_Criterion] = Field(_CRITERIA, max_length=12)
    """Criteria that each answer is scored by, from 1 to 5. Empty: only the preferred answer is asked."""
    seed: Annotated[Int, Field(ge=0)] = 0
    """Seed of the choice of questions, their order and the sides of the models."""

    @field_validator("criteria")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("lists a criterion twice; remove one")
        return value


class JudgeConfig(Section):
    """Another model that compares answers, through an OpenAI-compatible endpoint."""

    url: str
    """Base URL of the endpoint, up to /v1: `https://api.example.com/v1`, or `http://127.0.0.1:8000/v1`."""
    model: str = Field(min_length=1)
    """Model name at the endpoint."""
    key_env: str | None = None
    """Environment variable with the endpoint's API key. Default: no key is sent. Never write the key into a file."""
    samples: Positive = 100
    """Questions that are judged, each in both orders."""

    @model_validator(mode="after")
    def _no_secret_is_here(self) -> JudgeConfig:  # of the section, so that the message does not repeat its values
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be a URL such as https://api.example.com/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "url must not contain a user, key or query, because it is written to files; set key_env instead"
            )
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ValueError("key_env must be the name of an environment variable (letters, digits, _), not the key")
        return self


class EvaluateConfig(Section):
    """Eval loss during training, and the comparison with the base afterwards."""

    every: Positive | None = None
    """Steps between eval losses during training. Default: only after training."""
    early_stopping: Positive | None = None
    """Stop after this many eval losses in a row without a new best; needs `every`."""
    metrics: list[Metric] = Field(["loss", "rouge"], min_length=1)
    """Metrics that compare base and tuned model: `loss` (with perplexity and token accuracy; always computed), `rouge`,
    `bleu`, `chrf`, `bertscore`; `exact`: the answer equals the reference; `extract`: a pattern finds the same text
    in both; `format`: the answer matches a pattern; `json`: the answer is valid JSON; `classes`: accuracy and macro
    F1; `general`: loss on a general data set. `bleu`, `chrf` and `classes` need `pip install ftray[evaluate]`."""
    format: str | None = None
    """Regular expression that the whole answer must match, for the metric `format`."""
    extract: str | None = None
    """Regular expression for the metric `extract`; its first group is compared. `'#### (\\S+)'` extracts the result of
    GSM8K."""
    json_schema: str | None = Field(None, min_length=1)
    """File with a JSON schema that answers must match, for the metric `json`. Default: any JSON."""
    bertscore_model: str | None = Field(None, min_length=1)
    """Directory of the encoder for the metric `bertscore` (needs `pip install ftray[bertscore]`)."""
    general: str = Field("embedded:general", min_length=1)
    """Records of the metric `general`, which measures forgetting: a path, or the small set that comes with ftray."""
    few_shot: Annotated[Int, Field(ge=0)] = 0
    """Also compare with the base given this many training examples as earlier turns."""
    slices: str | None = Field(None, min_length=1)
    """Column of the eval records; every metric is also computed per value of it."""
    pairs: str | None = Field(None, min_length=1)
    """A .jsonl file of `{"a": …, "b": …}`: prompts that differ in one attribute. Both answers are shown side by side."""
    gates: dict[str, Gate] = Field({})
    """Conditions for publishing the tuned model, for example `{rouge_l: {min_gain: 0.02}, general_loss: {max_rise:
    0.05}}`: better than the base by at least `min_gain`, above or below the base by at most `max_rise` or
    `max_drop`, the metric itself from `min` to `max`. A missed gate ends the command with exit code 3."""
    price_per_hour: Annotated[Float, Field(gt=0)] | None = None
    """Price per hour of the hardware that one model answers on (a GPU with its share of the node), for the cost per
    1,000 tokens."""
    num_examples: Positive | None = None
    """Eval records for the loss. Default: all."""
    num_generations: Positive = 64
    """Eval records that all models answer."""
    num_shown: Annotated[Int, Field(ge=0)] = 5
    """Answers printed side by side."""
    max_new_tokens: Positive = 128
    """Longest answer, in tokens."""
    human: HumanEvalConfig = defaults()
    judge: JudgeConfig | None = None
    """Another model that compares the answers (`ftray evaluate judge`)."""

    @model_validator(mode="after")
    def _metrics_have_their_keys(self) -> EvaluateConfig:
        for key, pattern in (("format", self.format), ("extract", self.extract)):
            if (key in self.metrics) != (pattern is not None):
                raise ValueError(
                    f"the metric '{key}' and the key {key} (a regular expression) need each other; set both"
                )
            try:
                re.compile(pattern or "")
            except re.error as err:
                raise ValueError(f"{key} {pattern!r} is not a regular expression: {err}") from None
        if ("bertscore" in self.metrics) != (self.bertscore_model is not None):
            raise ValueError(
                "the metric 'bertscore' and the key bertscore_model (a directory) need each other; set both"
            )
        if self.json_schema is not None and "json" not in self.metrics:
            raise ValueError("json_schema needs the metric 'json'; add it to metrics, or remove json_schema")
        if self.early_stopping is not None and self.every is None:
            raise ValueError("early_stopping needs evaluate.every, the steps between eval losses")
        return self

    @model_validator(mode="after")
    def _gates_are_computed(self) -> EvaluateConfig:
        if (sentence := wrong_gate(self.gates, self.metrics)) is not None:
            raise ValueError(sentence)
        return self
