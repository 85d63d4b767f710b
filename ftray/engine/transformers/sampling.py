"""The next token of each row of a mixed batch: greedy and sampled requests side by side, each with its own seed.

Knows nothing of queues, threads, text or HTTP. transformers' continuous batching has one `do_sample` and one random generator
for the whole batch. Here the choice is made per row, inside its hook for logits processors: a sampled row is replaced by one
whose largest entry is the drawn token, and greedy rows stay as they are, so the batch's argmax is every request's answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from ftray.engine.protocol import SamplingParams, TokenLogprob
from ftray.engine.structured_output import SchemaGuide
from ftray.engine.transformers.mixed_lora import LoadedAdapter

_GREEDY_BELOW = 1e-5  # logits divided by less overflow, and the result is greedy anyway


@dataclass(frozen=True)
class RowSampling:
    """What continuous batching carries along with a request.

    Attributes:
        params: Its sampling parameters.
        adapter: Its adapter, or None for the base.
        guide: Its JSON schema or grammar.
        num_prompt_tokens: Tokens before the answer.
        logprobs: Of all tokens so far, written by the engine's thread before the tokens are delivered.
    """

    params: SamplingParams
    adapter: LoadedAdapter | None = None
    guide: SchemaGuide | None = None
    num_prompt_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> RowSampling:
        return self  # a request that is evicted from the cache is copied, and continues with the same state

    @property
    def is_sampled(self) -> bool:
        return self.params.temperature >= _GREEDY_BELOW

    @property
    def needs_history(self) -> bool:
        """Whether the next token depends on the earlier ones by more than the model."""
        return self.guide is not None or self.params.changes_logits


class RowSampler(ContinuousBatchingLogitsProcessor):
    """Temperature, top_p, seed, penalties and schema per request. Requests carry a `RowSampling` in `logit_processor_kwargs`."""

    supported_kwargs: ClassVar[dict[str, type]] = {"sampling": RowSampling}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._rows: list[tuple[int, RowSampling, int, list[int]]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Notes the rows that are not simply greedy or need log probabilities, and their positions.

        The engine runs batches one at a time (no async batching, no CUDA graph), so the next `__call__` is for these rows.
        The tensor that the caller expects carries nothing.
        """
        self._rows = []
        for row, request in enumerate(requests_with_new_token):
            state, sampling = request.state, request.state.logit_processor_kwargs["sampling"]
            if sampling.is_sampled or sampling.needs_history or sampling.params.num_logprobs is not None:
                # From the prompt's beginning: it stays when a request is evicted and prefilled again.
                position = len(state.initial_tokens) + len(state.generated_tokens)
                known = [*state.initial_tokens, *state.generated_tokens] if sampling.needs_history else []
                self._rows.append((row, sampling, position, known))
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """scores: float32 [num_rows, vocab]."""
        for row, sampling, position, known in self._rows:
            params = sampling.params
            own = scores[row].clone() if sampling.needs_history and params.num_logprobs is not None else scores[row]
            if params.changes_logits:
                penalize(scores[row], params, known, sampling.num_prompt_tokens)
            if sampling.guide:
                sampling.guide.mask(scores[row], known)
            token = sample_token(scores[row], params, position) if sampling.is_sampled else scores[row].argmax()
            if params.num_logprobs is not None:
                sampling.logprobs.append(explain_token(own, token, params.num_logprobs))
            if sampling.is_sampled:
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores


def penalize(logits: torch.Tensor, params: SamplingParams, token_ids: list[int], num_prompt_tokens: int) -> None:
    """Adds biases, then applies penalties, in the order and with the formulas of vLLM.

    Args:
        logits: float32 [vocab], changed in place.
        params: Biases and penalties.
        token_ids: Prompt and answer so far.
        num_prompt_tokens: How many of them are the prompt's.
    """
    for token, bias in params.logit_bias:
        logits[token] += bias
    if params.repetition_penalty != 1 and token_ids:
        known = torch.tensor(token_ids, device=logits.device).unique()
        values = logits[known]
        logits[known] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    answer = token_ids[num_prompt_tokens:]
    if answer and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.tensor(answer, device=logits.device).unique(return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts


def explain_token(logits: torch.Tensor, token: torch.Tensor, num_top: int) -> TokenLogprob:
    """Log probability of a token and of the `num_top` likeliest ones, from float32 logits [vocab]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    best = logprobs.topk(min(num_top, logprobs.shape[-1]))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(int(token), float(logprobs[token]), top)


def sample_token(logits: torch.Tensor, params: SamplingParams, position: int) -> torch.Tensor:
    """Draws one token id. The same logits, seed and position give the same token.

    The draw is an exponential race (Gumbel-max): token i wins with its probability if the smallest e_i / p_i is taken. The
    noise is a function of (seed, position), so a request needs no generator.

    Args:
        logits: float32 [vocab].
        params: temperature, min_p, top_k, top_p and seed.
        position: Number of the token in its sequence.
    """
    probs = torch.softmax(logits / params.temperature, dim=-1)
    if params.min_p > 0:
        probs[probs < params.min_p * probs.max()] = 0
        probs /= probs.sum()
    if params.top_p < 1 or 0 < params.top_k < len(probs):
        ordered, index = probs.sort(descending=True)
        if params.top_k:
            ordered[params.top_k :] = 0
            ordered /= ordered.sum()
        # Keep tokens until their sum reaches top_p, the one that crosses it included.
        ordered[ordered.cumsum(dim=-1) - ordered >= params.top_p] = 0
        probs = torch.zeros_like(probs).scatter_(0, index, ordered)
    generator = torch.Generator(device=logits.device)
    generator.manual_seed(_mix(params.seed or 0, position))
    noise = torch.empty_like(probs).exponential_(generator=generator).clamp_min_(1e-20)  # 0 / 0 would win the race
    return (probs / noise).argmax(dim=-1)


def _mix(seed: int, position: int) -> int:
    """63 well-spread bits (splitmix64's finalizer), so that neighboring seeds and positions share no noise."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + position + 1) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return (z ^ (z >> 31)) >> 1
