"""The section `evaluate`: metrics, gates, human evaluation and the judge."""

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
    """A number that a model is judged by. title: in tables. of: what has to be asked for in evaluate.metrics."""

    title: str
    of: Metric
    higher_is_better: bool = True


FIGURES: Mapping[str, Figure] = {
    "loss": Figure("held-out loss", "loss", False),
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
    """Limits of one figure, in its own unit. A limit that is just reached is kept."""

    min_gain: Annotated[Float, Field(ge=0)] | None = None
    """The tuned model must be better than its base by this: higher, or lower where that is better (losses)."""
    max_rise: Annotated[Float, Field(ge=0)] | None = None
    """It may be above its base by at most this."""
    max_drop: Annotated[Float, Field(ge=0)] | None = None
    """It may be below its base by at most this."""
    min: Float | None = None
    """Its own figure must be at least this."""
    max: Float | None = None
    """Its own figure may be at most this."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> Gate:
        if not self.limits:
            raise ValueError("is a gate without a limit; give it min_gain, max_rise, max_drop, min or max")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given."""
        return {name: value for name, value in self if value is not None}


def wrong_gate(gates: Mapping[str, Gate], metrics: Sequence[str]) -> str | None:
    """A sentence for the first gate that can't be judged by these metrics."""
    import difflib

    for name in gates:
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(FIGURES)}"
            return f"gates.{name}: there is no such figure; {remedy}"
        if FIGURES[name].of not in (*metrics, "loss"):
            return f"gates.{name} needs the metric '{FIGURES[name].of}', which isn't computed; add it to metrics"
    return None


_CRITERIA = ["accuracy", "relevance", "quality", "style", "safety"]


_Criterion = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9 _-]{0,29}$")]


class HumanEvalConfig(Section):
    """The blinded sheet of `ftray evaluate human`."""

    samples: Positive = 100
    """Questions on the sheet, of each slice its share; all that both models have answered (`num_generations`) where these
    are fewer."""
    criteria: list[_Criterion] = Field(_CRITERIA, max_length=12)
    """What each answer is scored by, from 1 to 5; of an empty list only the preferred answer is asked."""
    seed: Annotated[Int, Field(ge=0)] = 0
    """Another seed gives another choice, order and sides; the same always the same sheet."""

    @field_validator("criteria")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("names a criterion twice; remove one")
        return value


class JudgeConfig(Section):
    """Another model that says which answer is better, through an OpenAI-compatible endpoint."""

    url: str
    """The endpoint's base, up to /v1: `https://api.example.com/v1`, or `http://127.0.0.1:8000/v1`."""
    model: str = Field(min_length=1)
    """The model's name there."""
    key_env: str | None = None
    """Environment variable that holds the endpoint's key; left out: none is sent. The key itself belongs in no file."""
    samples: Positive = 100
    """Questions that are judged, each in both orders; all that there are where these are fewer."""

    @model_validator(mode="after")
    def _no_secret_is_here(self) -> JudgeConfig:  # of the whole section, whose values a message doesn't repeat
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be an address such as https://api.example.com/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "url must hold no user, key or query, which would end up in files; name the key by key_env"
            )
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ValueError("key_env must be the name of an environment variable (letters, digits, _), not the key")
        return self


class EvaluateConfig(Section):
    """Held-out loss during training, and the comparison with the base afterwards."""

    every: Positive | None = None
    """Steps between held-out losses during training; left out: only afterwards."""
    early_stopping: Positive | None = None
    """Stop after so many held-out losses in a row without a new best; needs `every`."""
    metrics: list[Metric] = Field(["loss", "rouge"], min_length=1)
    """What base and tuned model are compared by: `loss` (perplexity, token accuracy; always there), `rouge`, `bleu`, `chrf`,
    `bertscore`; `exact`: the answer is the reference; `extract`: what a pattern finds in both is the same; `format`: the
    answer has a form; `json`: it is JSON; `classes`: accuracy and macro F1; `general`: loss on a general set. `bleu`, `chrf`
    and `classes` need `pip install ftray[evaluate]`."""
    format: str | None = None
    """Regular expression that a whole answer must match, for the metric `format`."""
    extract: str | None = None
    """Regular expression for the metric `extract`; compared is its first group. `'#### (\\S+)'` is GSM8K's result."""
    json_schema: str | None = Field(None, min_length=1)
    """File of a JSON schema that answers must keep to, for the metric `json`; left out: any JSON will do."""
    bertscore_model: str | None = Field(None, min_length=1)
    """Directory of the encoder for the metric `bertscore` (needs `pip install ftray[bertscore]`)."""
    general: str = Field("embedded:general", min_length=1)
    """Records of the metric `general`, which shows what was forgotten: a path, or the small set that comes with ftray."""
    few_shot: Annotated[Int, Field(ge=0)] = 0
    """Compare with a base that sees so many training examples as earlier turns, too."""
    slices: str | None = Field(None, min_length=1)
    """Column of the held-out records; every figure is also given for each of its values."""
    pairs: str | None = Field(None, min_length=1)
    """A .jsonl file of `{"a": …, "b": …}`, prompts that differ in one attribute; both answers are put side by side."""
    gates: dict[str, Gate] = Field({})
    """Figures that decide whether the tuned model may be published, e.g. `{rouge_l: {min_gain: 0.02}, general_loss:
    {max_rise: 0.05}}`: better by at least `min_gain`, above or below the base by at most `max_rise`, `max_drop`, itself from
    `min` to `max`. A gate that is missed ends the command with exit code 3."""
    price_per_hour: Annotated[Float, Field(gt=0)] | None = None
    """Price of an hour of what one model answers on (a GPU's share of its node), for the cost of 1,000 tokens."""
    num_examples: Positive | None = None
    """Held-out records that the loss is taken over; left out: all."""
    num_generations: Positive = 64
    """Held-out examples that all models answer."""
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
                    f"the metric '{key}' and the key {key} (a regular expression) belong together; give both"
                )
            try:
                re.compile(pattern or "")
            except re.error as err:
                raise ValueError(f"{key} {pattern!r} is not a regular expression: {err}") from None
        if ("bertscore" in self.metrics) != (self.bertscore_model is not None):
            raise ValueError(
                "the metric 'bertscore' and the key bertscore_model (a directory) belong together; give both"
            )
        if self.json_schema is not None and "json" not in self.metrics:
            raise ValueError("json_schema is for the metric 'json'; add it to metrics, or remove the key")
        if self.early_stopping is not None and self.every is None:
            raise ValueError("early_stopping needs evaluate.every, the steps between held-out losses")
        return self

    @model_validator(mode="after")
    def _gates_are_computed(self) -> EvaluateConfig:
        if (sentence := wrong_gate(self.gates, self.metrics)) is not None:
            raise ValueError(sentence)
        return self
