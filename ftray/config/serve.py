"""The section `serve`: the OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ftray.config.base import Float, Int, Positive, Section


class CanaryConfig(Section):
    """A model of `ab` on trial: it gets no more requests once its bounds are left, and an event says why."""

    model: str
    """Its name in `ab`."""
    max_error_rate: Annotated[Float, Field(ge=0, lt=1)] = 0.02
    """Share of its last 200 answers that may fail. It is returned when more fail, at least three, and no chance explains why the
    others' answers of the same time fail less (beta-binomial test, at 1% each time it is looked at)."""
    max_latency_ratio: Annotated[Float, Field(gt=1)] = 2.0
    """Its median time to first text over the other models' together, both over at least 20 answers."""


class FeedbackConfig(Section):
    """What `POST /v1/feedback` keeps, and how much of it each API key may leave; counted by each replica."""

    max_bytes: Annotated[Int, Field(ge=1, le=1 << 20)] = 65536
    """Largest request, in bytes."""
    records_per_day: Positive = 1000
    """Records that each API key may leave a day."""
    bytes_per_day: Positive = 10_000_000
    """Bytes of records that each API key may leave a day."""


class ServeConfig(Section):
    """The OpenAI-compatible endpoint."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What computes the answers: transformers' continuous batching, or vLLM (`pip install ftray[vllm]`)."""
    tensor_parallel: Positive = 1
    """GPUs that a replica's weights are spread over, with vLLM."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs API keys: FTRAY_API_KEY or FTRAY_API_KEY_FILE in the environment."""
    port: Annotated[Int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    min_replicas: Annotated[Int, Field(ge=0)] = 1
    """Replicas kept up. 0: all go when nobody asks; the next request waits until the model is loaded again."""
    max_replicas: Positive = 1
    """Replicas at most."""
    target_ongoing_requests: Annotated[Float, Field(gt=0)] = 8.0
    """Ongoing requests a replica that autoscaling aims for."""
    target_first_token_s: Annotated[Float, Field(gt=0)] | None = None
    """Seconds to the first text, in the median, beyond which replicas are added though fewer requests are ongoing."""
    upscale_delay_s: Annotated[Float, Field(ge=0)] = 30.0
    """Seconds for which more replicas must be wanted before they are added."""
    downscale_delay_s: Annotated[Float, Field(ge=0)] = 600.0
    """Seconds for which fewer must be wanted before some go, each after its last answer."""
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
    max_adapter_mb: Positive = 4096
    """Largest weights file, in MB, of a published adapter; larger ones are not served."""
    trusted_keys: list[str] = Field([])
    """Public Ed25519 keys as `ftray publish --sign` prints them, `ed25519:…`. With any, published adapters are served only if
    one of these keys signed them; none: signatures are not looked at."""
    feedback: FeedbackConfig | None = None
    """Keep what users think of answers, as records that training can read. Left out: `POST /v1/feedback` is refused."""
    ab: dict[str, Annotated[Float, Field(ge=0)]] = Field({})
    """Models and their shares of the requests for the model `default`, e.g. `{support: 0.9, "llama:support-2": 0.1}`. A user
    (the request's `user` or `safety_identifier`) stays with one model."""
    canary: CanaryConfig | None = None
    """A model of `ab` on trial."""

    @property
    def proxy_timeout_s(self) -> float:
        """Seconds after which a request is ended that no replica came up for; an answer itself ends before."""
        return self.max_answer_s + 600

    @field_validator("trusted_keys")
    @classmethod
    def _keys_are_keys(cls, keys: list[str]) -> list[str]:
        for key in keys:
            try:
                size = len(base64.b64decode(key.removeprefix("ed25519:"), validate=True))
            except ValueError:
                size = 0
            if not key.startswith("ed25519:") or size != 32:
                raise ValueError(
                    f"{key[:60]!r} is no public key; give what `ftray publish --sign` prints: ed25519: and 44 characters"
                )
        return keys

    @model_validator(mode="after")
    def _shares_fit(self) -> ServeConfig:
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
    def _spread_needs_vllm(self) -> ServeConfig:
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(
                f"tensor_parallel ({self.tensor_parallel}) needs engine vllm; set serve.engine: vllm, or 1"
            )
        return self

    @model_validator(mode="after")
    def _replicas_in_order(self) -> ServeConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas}); raise it"
            )
        return self
