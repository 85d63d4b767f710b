"""The protocol of all engines: prompt ids → chunks of text. Types that evaluation, serving and engines share.

Needs only the standard library: no HTTP, Ray, torch, transformers or chat templates.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
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
    """Answers cannot be constrained to this JSON schema."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request.

    Attributes:
        temperature: 0 is greedy; top_p and seed then have no effect.
        seed: Without a seed every sampled answer differs. With one it repeats as far as rounding allows: other members of the
            batch
            may change logits by a rounding error.
        num_logprobs: Number of likeliest tokens returned with each token's log probability. 0: only its own; None: none.

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
    ) -> AsyncIterator[OutputChunk]:
        """adapter: a loaded adapter (otherwise ModelError), or None for the base. Unloading it ends no request."""

    def check_schema(self, schema: str) -> None:
        """Raises SchemaError for a JSON schema that answers cannot be constrained to. May take a second; any thread."""

    async def abort(self, request_id: str) -> None: ...

    async def load_adapter(self, name: str, directory: str) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    def list_models(self) -> list[str]: ...

    def health(self) -> None:
        """Raises EngineError unless requests can be answered."""

    async def stop(self) -> None: ...


def check_prompt(prompt_ids: list[int], max_tokens: int, vocab_size: int, max_context: int) -> None:
    """Raises DataError for an empty prompt or unknown ids, ContextLengthError for a prompt that is too long."""
    if not prompt_ids:
        raise DataError("the prompt is empty")
    if not all(0 <= token < vocab_size for token in prompt_ids):
        raise DataError(f"the prompt holds token ids outside the model's vocabulary (0 to {vocab_size - 1})")
    if len(prompt_ids) + max_tokens > max_context:
        raise ContextLengthError(
            f"the prompt ({len(prompt_ids)} tokens) and max_tokens ({max_tokens}) exceed the context of "
            f"{max_context} tokens; shorten one of them"
        )
