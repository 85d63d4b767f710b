"""The sections of what follows training: evaluate and serve."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ftray.config.base import Float, Int, Positive, Section
from ftray.config.gates import Gate, Metric, wrong_gate
from ftray.config.raters import HumanEvalConfig, JudgeConfig


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
    human: HumanEvalConfig = HumanEvalConfig()
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


class CanaryConfig(Section):
    """A model of `ab` on trial: it gets no more requests once its bounds are left, and an event says why."""

    model: str
    """Its name in `ab`."""
    max_error_rate: Annotated[Float, Field(ge=0, lt=1)] = 0.02
    """Share of its last 200 answers that may fail. It is returned when more fail, at least three, and no chance explains why the
    others' answers of the same time fail less (beta-binomial test, at 1% each time it is looked at)."""
    max_latency_ratio: Annotated[Float, Field(gt=1)] = 2.0
    """Its median time to first text over the other models' together, both over at least 20 answers."""


class Feedback(Section):
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
    feedback: Feedback | None = None
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
