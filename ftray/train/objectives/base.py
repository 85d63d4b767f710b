"""The objective: what a run minimizes. Each is one file that registers itself by name.

An objective states which examples it accepts, and computes from a model and a `Batch` the loss as (sum, weight). The loss of a
step is the sum over all ranks divided by the weight of the global batch. The trainer uses objectives only through this class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch

from ftray import config
from ftray.data.example_spec import ExampleSpec
from ftray.data.packing import IGNORE_INDEX
from ftray.model.families import family_of
from ftray.train.batch import Batch

if TYPE_CHECKING:
    from ftray.data.loader import RankBatch

TRIAL_TOKENS, TRIAL_ROWS = 3, 8  # of the trial: hidden states, rows of the stand-in weight
TOLERANCE = 1e-5


class Objective(ABC):
    """Computes the loss.

    Attributes:
        name: Key in the registry.
        examples: Records that it accepts, and how they become sequences.
    """

    name: ClassVar[str]
    examples: ClassVar[ExampleSpec] = ExampleSpec()

    @classmethod
    @abstractmethod
    def from_config(cls, run: config.RunConfig) -> Self:
        """The objective with a run's settings."""

    @abstractmethod
    def loss(self, model: ObjectiveModel, batch: Batch) -> tuple[torch.Tensor, float]:
        """The loss of a micro-batch as a sum and its weight.

        Args:
            model: The model in training or eval mode.
            batch: Packed sequences.

        Returns:
            The sum, a float32 scalar, and its weight, the number of terms.
        """

    def weight(self, batch: RankBatch) -> float:
        """The weight of a rank's batch, known before its first forward pass: the number of trained tokens."""
        return float((batch.labels != IGNORE_INDEX).sum())

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Metrics since the last call, by name: (sum, weight) on this rank. Every rank returns the same names."""
        return {}

    def build_head(self, causal: Any) -> torch.nn.Module | None:
        """A module that computes the output head and the loss at once; None to get logits from the model."""
        del causal
        return None


class ObjectiveModel(torch.nn.Module):
    """A causal language model whose forward is its objective's loss of a `Batch`; DeepSpeed's engine wraps it.

    Attention stays inside each document: the model family passes the documents' boundaries on.

    Args:
        model: A transformers causal language model, or a PEFT model of one.
        objective: The objective.
    """

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.family = family_of(self.causal.config)
        self.head = objective.build_head(self.causal) if is_plain(self.causal) else None

    @property
    def decoder(self) -> torch.nn.Module:
        """Embeddings and blocks, without the head."""
        decoder: torch.nn.Module = self.causal.get_decoder()
        return decoder

    def forward(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """The objective's loss as (sum, weight)."""
        return self.objective.loss(self, batch)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments for the decoder's or the model's forward."""
        tokens = (
            {"input_ids": batch.input_ids} if batch.inputs_embeds is None else {"inputs_embeds": batch.inputs_embeds}
        )
        documents = self.family.document_inputs(batch.cu_seqlens, batch.max_length)
        return {**tokens, "position_ids": batch.position_ids, "use_cache": False, **documents}

    def hidden(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states [n, width] of the tokens at these positions, int64 [n]."""
        states: torch.Tensor = self.decoder(**self.inputs(batch)).last_hidden_state
        return states.squeeze(0).index_select(0, tokens)

    def logits(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] of the tokens at these positions, int64 [n]."""
        model = self.model if batch.inputs_embeds is None else self.causal  # PEFT would add its own embeddings again
        logits: torch.Tensor = model(**self.inputs(batch), logits_to_keep=tokens).logits[0]
        return logits


O = TypeVar("O", bound=type[Objective])  # noqa: E741
_OBJECTIVES: dict[str, type[Objective]] = {}


def register(objective: O) -> O:
    """Class decorator: makes an objective known by its name. Raises ValueError for a name that is taken."""
    if objective.name in _OBJECTIVES:
        raise ValueError(f"the objective {objective.name} is registered twice")
    _OBJECTIVES[objective.name] = objective
    return objective


def objective_type(name: str) -> type[Objective]:
    """The class of an objective. Raises KeyError for an unknown name."""
    return _OBJECTIVES[name]


def is_plain(causal: Any) -> bool:
    """Whether the logits are the last hidden states times the output embedding: no adapter, bias, scale, cap or cut.

    Models scale, cap, shift or cut their logits by settings of many names. So the model's own forward is tried, with random
    hidden states in place of the decoder's, and a small random weight in place of the head's.
    """
    head = causal.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    decoder = causal.get_decoder()
    if decoder is causal:  # a class that does not separate its blocks from the whole
        return False
    rows = getattr(head.weight, "ds_shape", head.weight.shape)[0]
    if rows != causal.config.get_text_config().vocab_size:  # logits may be cut to the vocabulary
        return False
    from transformers.modeling_outputs import MoeModelOutputWithPast

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TRIAL_TOKENS, head.in_features, generator=generator)
    weight = torch.randn(TRIAL_ROWS, head.in_features, generator=generator)
    wanted = hidden @ weight.T

    def decode(*_: Any, **__: Any) -> Any:
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    def project(states: torch.Tensor) -> torch.Tensor:
        return states @ weight.T

    try:
        with torch.no_grad(), _replaced(decoder, decode), _replaced(head, project):
            logits = causal(input_ids=torch.zeros(1, TRIAL_TOKENS, dtype=torch.long), use_cache=False).logits
            return logits.shape == wanted.shape and torch.allclose(logits.float(), wanted, rtol=TOLERANCE)
    except Exception:  # noqa: BLE001 - a forward that needs more than hidden states is not plain
        return False


@contextmanager
def _replaced(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    """Inside, a module computes something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
