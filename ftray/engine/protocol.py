"""The protocol of all engines: prompt ids → chunks of text. Types that evaluation, serving and engines share.

Needs only the standard library: no HTTP, Ray, torch, transformers or chat templates.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ftray.errors import DataError, RunError

FinishReason = Literal["stop", "length"]
MAX_LOGPROBS = 20


class EngineError(RunError):
    """The engine died or was stopped, or a request was aborted. The input is not the cause."""


class StuckError(EngineError):
    """One answer cannot continue as requested. The engine and all other answers are unaffected."""


class ContextLengthError(DataError):
    """Prompt and requested tokens do not fit into the model's context."""


class SchemaError(DataError):
    """Answers cannot be constrained to this JSON schema or grammar."""


class ParameterError(DataError):
    """A sampling parameter does not fit the model. name: its field in `SamplingParams`."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request.

    Attributes:
        temperature: 0 is greedy; top_p, top_k, min_p and seed then have no effect.
        top_k: Sample from this many likeliest tokens; 0: from all.
        min_p: Sample from tokens at least this likely, relative to the likeliest one.
        presence_penalty: Subtracted from the logits of all tokens that the answer has already.
        frequency_penalty: Subtracted once for each time that the answer has the token.
        repetition_penalty: Divides the logits of tokens in prompt and answer, and multiplies negative ones; 1: off.
        logit_bias: (token id, value) pairs, added to the logits.
        seed: Without a seed every sampled answer differs. With one it repeats as far as rounding allows: other members of the
            batch
            may change logits by a rounding error.
        num_logprobs: Number of likeliest tokens returned with each token's log probability. 0: only its own; None: none.
        json_schema: A JSON schema that the answer follows.
        grammar: A grammar that the answer follows, as llguidance reads it. At most one of the two.
        visible_ids: Special tokens whose text is part of the answer's text. All others are left out.

    Raises:
        DataError: A value is out of bounds.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_logprobs: int | None = None
    json_schema: str | None = None
    grammar: str | None = None
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    visible_ids: frozenset[int] = frozenset()

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases may change even a greedy answer."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties) or bool(self.logit_bias)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise DataError(f"max_tokens ({self.max_tokens}) must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise DataError(f"temperature ({self.temperature}) must be a number from 0 up; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p ({self.top_p}) must lie above 0 and be at most 1")
        if not all(self.stop):
            raise DataError("stop holds an empty string; leave it out")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise DataError(f"num_logprobs ({self.num_logprobs}) must be 0 to {MAX_LOGPROBS}")
        if self.json_schema is not None and self.grammar is not None:
            raise DataError("json_schema and grammar exclude each other")
        if self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise DataError(f"top_k ({self.top_k}) must be at least 0, and min_p ({self.min_p}) 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise DataError(f"repetition_penalty ({self.repetition_penalty}) must be a number above 0")
        if not all(
            map(math.isfinite, (self.presence_penalty, self.frequency_penalty, *dict(self.logit_bias).values()))
        ):
            raise DataError("penalties and biases must be numbers")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log probabilities of one generated token, before temperature and top_p.

    Attributes:
        top: The likeliest tokens at its position, best first, as (token id, log probability).
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class OutputChunk:
    """The output since the last chunk. The last chunk has a finish_reason.

    Attributes:
        text: Never half a character, part of a stop string or the end token.
        token_ids: All generated tokens, including the end token. The text may lag behind, and is complete with the last chunk.
        logprobs: One per token, if requested.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer. token_ids: as in OutputChunk. seconds: from its request to its end, next to the others of its batch."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    seconds: float = field(default=0.0, compare=False)


class OutputStream(Protocol):
    """The chunks of one answer. Closing it early frees the request's place."""

    def __aiter__(self) -> AsyncIterator[OutputChunk]: ...

    def __anext__(self) -> Awaitable[OutputChunk]: ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """One base model, and adapters if the engine supports them.

    All methods belong to one event loop. `generate` checks its arguments at once (DataError, ContextLengthError) and then
    queues
    nothing. The iterator raises EngineError if the engine dies and never waits forever. Leaving the iterator early (aclose,
    cancellation) frees the request's place, as does `abort`.
    """

    tokenizer: Any
    max_context: int

    async def start(self) -> None: ...

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> OutputStream:
        """adapter: a loaded adapter (otherwise ModelError), or None for the base. Unloading it ends no request."""

    def check_schema(self, schema: str) -> None:
        """Raises SchemaError for a JSON schema that answers cannot be constrained to. May take a second; any thread."""

    def check_grammar(self, grammar: str) -> None:
        """Raises SchemaError for a grammar that answers cannot be constrained to. May take a second; any thread."""

    async def abort(self, request_id: str) -> None: ...

    async def load_adapter(self, name: str, directory: str) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    def list_models(self) -> list[str]: ...

    def health(self) -> None:
        """Raises EngineError unless requests can be answered."""

    async def stop(self) -> None: ...


def check_request(prompt_ids: list[int], params: SamplingParams, vocab_size: int, max_context: int) -> None:
    """Checks a request.

    Raises:
        ContextLengthError: Prompt and answer exceed the context.
        ParameterError: logit_bias has a token that the model lacks.
        DataError: The prompt is empty or has unknown ids.
    """
    if not prompt_ids:
        raise DataError("the prompt is empty")
    if not all(0 <= token < vocab_size for token in prompt_ids):
        raise DataError(f"the prompt holds token ids outside the model's vocabulary (0 to {vocab_size - 1})")
    if wrong := [token for token, _ in params.logit_bias if not 0 <= token < vocab_size]:
        raise ParameterError(
            "logit_bias",
            f"logit_bias holds the token id {wrong[0]}, which is outside the model's vocabulary (0 to {vocab_size - 1})",
        )
    if (total := len(prompt_ids) + params.max_tokens) > max_context:
        raise ContextLengthError(  # clients such as litellm recognize the first sentence
            f"This model's maximum context length is {max_context} tokens. However, you requested {total} tokens "
            f"({len(prompt_ids)} in the prompt, {params.max_tokens} in the answer); shorten one of them"
        )
