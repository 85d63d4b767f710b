"""The sections of what follows training: evaluate and serve."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ftray.config.base import Float, Int, Positive, Section
from ftray.config.opinions import Human, Judge


class Evaluate(Section):
    """Held-out loss during training, and the comparison with the base afterwards."""

    every: Positive | None = None
    """Steps between held-out losses during training; left out: only afterwards."""
    early_stopping: Positive | None = None
    """Stop after so many held-out losses in a row without a new best; needs `every`."""
    metrics: list[Literal["loss", "rouge", "format"]] = Field(["loss", "rouge"], min_length=1)
    """What base and tuned model are compared by."""
    format: str | None = None
    """Regular expression that a whole answer must match, for the metric `format`."""
    num_generations: Positive = 64
    """Held-out examples that both models answer."""
    num_shown: Annotated[Int, Field(ge=0)] = 5
    """Answers printed side by side."""
    max_new_tokens: Positive = 128
    """Longest answer, in tokens."""
    human: Human = Human()
    judge: Judge | None = None
    """Another model that compares the answers (`ftray evaluate judge`)."""

    @model_validator(mode="after")
    def _format_fits(self) -> Evaluate:
        if ("format" in self.metrics) != (self.format is not None):
            raise ValueError("the metric 'format' and the key format (a regular expression) belong together; give both")
        try:
            re.compile(self.format or "")
        except re.error as err:
            raise ValueError(f"format {self.format!r} is not a regular expression: {err}") from None
        if self.early_stopping is not None and self.every is None:
            raise ValueError("early_stopping needs evaluate.every, the steps between held-out losses")
        return self


class Canary(Section):
    """A model of `ab` on trial: it gets no more requests once its bounds are left, and an event says why."""

    model: str
    """Its name in `ab`."""
    max_error_rate: Annotated[Float, Field(ge=0, lt=1)] = 0.02
    """Share of its answers that may fail, over its last 200, from the 20th on."""
    max_latency_ratio: Annotated[Float, Field(gt=1)] = 2.0
    """Its median time to first text over the other models' together, both over at least 20 answers."""


class Serve(Section):
    """The OpenAI-compatible endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs API keys: FTRAY_API_KEY or FTRAY_API_KEY_FILE in the environment."""
    port: Annotated[Int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    min_replicas: Positive = 1
    """Replicas kept up."""
    max_replicas: Positive = 1
    """Replicas at most."""
    target_ongoing_requests: Annotated[Float, Field(gt=0)] = 8.0
    """Ongoing requests a replica that autoscaling aims for."""
    max_queued_requests: Positive = 64
    """Requests that may wait; more are answered 503."""
    max_tokens: Positive = 1024
    """Most tokens that a request may ask for; also the default."""
    max_answer_s: Positive = 600
    """Seconds after which an answer is ended with an error."""
    max_adapters: Annotated[Int, Field(ge=0)] = 8
    """Adapters that a replica holds at a time over the base; others are loaded when asked for. 0: no base and no adapters,
    only the run's merged weights, which answer a little faster."""
    requests_per_minute: Positive | None = None
    """Requests that each API key may send; counted by each replica."""
    tokens_per_minute: Positive | None = None
    """Tokens, of prompts and answers, that each API key may use; counted by each replica."""
    tokens_per_day: Positive | None = None
    """The same over a day."""
    ab: dict[str, Annotated[Float, Field(ge=0)]] = Field({})
    """Models and their shares of the requests for the model `default`, e.g. `{support: 0.9, "llama:support-2": 0.1}`. A user
    (the request's `user` or `safety_identifier`) stays with one model."""
    canary: Canary | None = None
    """A model of `ab` on trial."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Serve:
        if self.ab and not sum(self.ab.values()) > 0:
            raise ValueError("ab gives no model a share above 0; raise one")
        if "default" in self.ab:
            raise ValueError("ab can't hold the model 'default': that is what its requests ask for; name another")
        if self.canary is not None and (self.canary.model not in self.ab or len(self.ab) < 2):
            raise ValueError(
                f"canary.model ({self.canary.model}) must be one of at least two models in ab; add it there"
            )
        return self

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Serve:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas}); raise it"
            )
        return self
