"""What every engine promises: prompt ids → chunks of text. The words that evaluation, serving and engines share.

Knows nothing of HTTP, Ray, torch, transformers or chat templates; needs nothing but the standard library.
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
    """The engine died, was stopped, or a request was aborted: nobody's input is to blame."""


class StuckError(EngineError):
    """One answer can't go on as its request wants it; the engine and all others are well."""


class ContextLengthError(DataError):
    """Prompt and requested tokens don't fit into the model's context."""


class SchemaError(DataError):
    """Answers can't be held to this JSON schema."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is answered. Raises DataError for values out of bounds.

    temperature 0 is greedy (then top_p and seed have no effect). Without a seed every sampled answer is another; with
    one it repeats as far as rounding allows, since a batch's other members may shift logits by a rounding error.
    num_logprobs: likeliest tokens told with each token's own log probability; 0: only its own; None: none at all.
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
    """What the model thought of one token it generated: natural log probabilities before temperature and top_p.

    top: the likeliest tokens in its place, best first, as (token id, log probability).
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class OutputChunk:
    """What came since the last chunk. The last one has a finish_reason.

    text: never half a character, never a part of a stop string, never the end token. token_ids: all that was generated,
    the end token included; text may lag behind them, and comes whole by the last chunk. logprobs: one for each token,
    where they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer; token_ids as in Chunk. seconds: from its request to its end, beside the others of its batch."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    seconds: float = field(default=0.0, compare=False)


class Engine(Protocol):
    """One base model, and adapters where the engine can hold them.

    All methods belong to one event loop. `generate` checks its arguments at once (DataError, ContextLengthError) and
    queues nothing then; the iterator raises EngineError when the engine dies, never waits forever. Leaving the
    iterator early (aclose, cancellation) frees the request's place, as `abort` does by name.
    """

    tokenizer: Any
    max_context: int

    async def start(self) -> None: ...

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, *, adapter: str | None = None
    ) -> AsyncIterator[OutputChunk]:
        """adapter: one that is loaded (ModelError if it isn't); None: the base. Unloading it ends no request."""

    def check_schema(self, schema: str) -> None:
        """Raises SchemaError for a JSON schema that answers can't be held to. May take a second; any thread."""

    async def abort(self, request_id: str) -> None: ...

    async def load_adapter(self, name: str, directory: str) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    def list_models(self) -> list[str]: ...

    def health(self) -> None:
        """Raises EngineError unless requests can be answered."""

    async def stop(self) -> None: ...


def check_prompt(prompt_ids: list[int], max_tokens: int, vocab_size: int, max_context: int) -> None:
    """Raises DataError for a prompt that is empty or holds strange ids, ContextLengthError for one that is too long."""
    if not prompt_ids:
        raise DataError("the prompt is empty")
    if not all(0 <= token < vocab_size for token in prompt_ids):
        raise DataError(f"the prompt holds token ids outside the model's vocabulary (0 to {vocab_size - 1})")
    if len(prompt_ids) + max_tokens > max_context:
        raise ContextLengthError(
            f"the prompt ({len(prompt_ids)} tokens) and max_tokens ({max_tokens}) exceed the context of "
            f"{max_context} tokens; shorten one of them"
        )
