"""The section `serve`: the OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ftray.config.base import Float, Int, Positive, Section


class CanaryConfig(Section):
    """A model of `ab` on trial. It is taken out of rotation when it leaves its bounds, and an event gives the reason."""

    model: str
    """Its name in `ab`."""
    max_error_rate: Annotated[Float, Field(ge=0, lt=1)] = 0.02
    """Error rate limit over its last 200 answers. The canary is removed above it, with at least three errors, if it
    fails significantly more often than the other models in the same time (beta-binomial test, 1% level per check)."""
    max_latency_ratio: Annotated[Float, Field(gt=1)] = 2.0
    """Limit of its median time to first token, relative to all other models, over at least 20 answers each."""


class FeedbackConfig(Section):
    """Limits of `POST /v1/feedback`, per API key and replica."""

    max_bytes: Annotated[Int, Field(ge=1, le=1 << 20)] = 65536
    """Largest request, in bytes."""
    records_per_day: Positive = 1000
    """Records per API key and day."""
    bytes_per_day: Positive = 10_000_000
    """Bytes per API key and day."""


class ServeConfig(Section):
    """The OpenAI-compatible endpoint."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Inference engine: transformers with continuous batching, or vLLM (`pip install ftray[vllm]`)."""
    tensor_parallel: Positive = 1
    """GPUs per replica, with vLLM."""
    host: str = "127.0.0.1"
    """Address to listen on. Any address except loopback needs API keys: FTRAY_API_KEY or FTRAY_API_KEY_FILE in the
    environment."""
    port: Annotated[Int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    min_replicas: Annotated[Int, Field(ge=0)] = 1
    """Minimum number of replicas. 0: scale to zero when idle; the next request waits until the model is loaded."""
    max_replicas: Positive = 1
    """Maximum number of replicas."""
    target_ongoing_requests: Annotated[Float, Field(gt=0)] = 8.0
    """Ongoing requests per replica that autoscaling aims for."""
    target_first_token_s: Annotated[Float, Field(gt=0)] | None = None
    """Median time to first token above which replicas are added, even with fewer ongoing requests."""
    upscale_delay_s: Annotated[Float, Field(ge=0)] = 30.0
    """Seconds of sustained load before replicas are added."""
    downscale_delay_s: Annotated[Float, Field(ge=0)] = 600.0
    """Seconds of lower load before replicas are removed, each after its last answer."""
    max_queued_requests: Positive = 64
    """Requests that may wait; more get status 503."""
    max_tokens: Positive = 1024
    """Limit and default of a request's max_tokens."""
    max_answer_s: Positive = 600
    """Seconds after which an answer ends with an error."""
    max_adapters: Annotated[Int, Field(ge=0)] = 8
    """Adapters that a replica holds at once; others are loaded on demand. 0: serve only the run's merged weights, which
    is slightly faster."""
    requests_per_minute: Positive | None = None
    """Requests per API key and minute, counted per replica."""
    tokens_per_minute: Positive | None = None
    """Prompt and completion tokens per API key and minute, counted per replica."""
    tokens_per_day: Positive | None = None
    """Prompt and completion tokens per API key and day, counted per replica."""
    max_adapter_mb: Positive = 4096
    """Largest weights file of a published adapter, in MB. Larger adapters are not served."""
    trusted_keys: list[str] = Field([])
    """Public Ed25519 keys as printed by `ftray publish --sign` (`ed25519:…`). If set, only published adapters signed by
    one of these keys are served; if empty, signatures are ignored."""
    cors_origins: list[str] = Field([])
    """Origins of web pages that may call the endpoint from a browser (CORS), for example `https://app.example.com`;
    `"*"`: any page. API keys in a page are readable by its users."""
    feedback: FeedbackConfig | None = None
    """Store user feedback as records that training can read. Default: `POST /v1/feedback` is refused."""
    ab: dict[str, Annotated[Float, Field(ge=0)]] = Field({})
    """Traffic shares of models for requests to the model `default`, for example `{support: 0.9, "llama:support-2":
    0.1}`. A user (`user` or `safety_identifier` of the request) always gets the same model."""
    canary: CanaryConfig | None = None
    """A model of `ab` on trial."""

    @property
    def proxy_timeout_s(self) -> float:
        """Seconds until the proxy ends a request, long enough for a replica to start and answer."""
        return self.max_answer_s + 600

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
                raise ValueError(
                    f"{origin[:60]!r} is not an origin; write scheme, host and port, such as https://app.example.com, or *"
                )
        return origins

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
                    f"{key[:60]!r} is not a public key; use what `ftray publish --sign` prints (ed25519: and 44 characters)"
                )
        return keys

    @model_validator(mode="after")
    def _shares_fit(self) -> ServeConfig:
        if self.ab and not sum(self.ab.values()) > 0:
            raise ValueError("ab has no share above 0; raise one")
        if "default" in self.ab:
            raise ValueError("ab can't contain 'default', which is the model name of its requests; use another name")
        if self.canary is not None and (self.canary.model not in self.ab or len(self.ab) < 2):
            raise ValueError(
                f"canary.model ({self.canary.model}) must be one of at least two models in ab; add it to ab"
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
