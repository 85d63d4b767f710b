"""Answers that keep to a JSON schema: which tokens may come next. Knows a tokenizer and llguidance; no model, no batch.

JSON comes without whitespace between its parts, in both engines: a model can't then fill its answer with blanks.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import torch

from ftray.engine.protocol import SchemaError

_COMPACT = {"whitespace_flexible": False}


class Schemas:
    """Schemas over one tokenizer. end_ids: tokens that may end an answer. Any thread may use it."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._lock = threading.Lock()
        self._made: Any = None

    def guide(self, schema: str) -> Guide:
        """For one answer. The first one costs a second. Raises SchemaError for a schema that can't be kept to."""
        from llguidance import LLMatcher

        try:
            json.loads(schema)
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)
            if not (error := LLMatcher.validate_grammar(grammar, self._of_tokenizer())):
                return Guide(LLMatcher(self._of_tokenizer(), grammar), self._end_ids)
        except (ValueError, TypeError, RecursionError) as err:
            error = str(err)
        raise SchemaError(f"the JSON schema can't be kept to: {' '.join(error.split())[:200]}")

    def _of_tokenizer(self) -> Any:
        with self._lock:
            if self._made is None:
                from llguidance.hf import from_tokenizer

                n_vocab = max(self._vocab_size, len(self._tokenizer))
                self._made = from_tokenizer(self._tokenizer, n_vocab, list(self._end_ids) or None)
            return self._made


class Guide:
    """How far one answer is in its schema. error: why it can't be followed any further; the answer then has to end."""

    def __init__(self, matcher: Any, end_ids: tuple[int, ...]) -> None:
        self._matcher, self._end_ids = matcher, end_ids
        self._num_seen: int | None = None  # tokens of prompt and answer that it knows
        self.error: str | None = None

    def mask(self, logits: torch.Tensor, token_ids: list[int]) -> None:
        """Sets logits [vocab] of tokens that can't come next to -inf. token_ids: of prompt and answer so far.

        Raises nothing, or one request would end the engine: where the matcher gives up, only end tokens are left.
        """
        if self._num_seen is None:
            self._num_seen = len(token_ids)
        new, self._num_seen = token_ids[self._num_seen :], len(token_ids)
        keep = torch.zeros(logits.shape[-1], dtype=torch.bool)
        try:
            if not self._matcher.consume_tokens(new):
                raise ValueError(self._matcher.get_error())
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if self._matcher.is_error():
                raise ValueError(self._matcher.get_error())
            allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]].astype(bool)
            keep[: len(allowed)] = torch.from_numpy(allowed)
        except (ValueError, RuntimeError) as err:
            self.error = self.error or str(err)
            keep[list(self._end_ids)] = True
        logits[~keep.to(logits.device)] = float("-inf")
