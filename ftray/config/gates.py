"""What models are compared by, and the gates that a tuned model must pass. Names and limits only; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from ftray.config.base import Float, Section

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
