"""Answers that keep to a JSON schema: which tokens may come next. Knows a tokenizer and llguidance; no model, no batch.

JSON comes without whitespace between its parts, in both engines: a model can't then fill its answer with blanks.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from ftray.engine.protocol import SchemaError

_COMPACT = {"whitespace_flexible": False}
_NUM_KEPT = 32  # compiled schemas


class SchemaCompiler:
    """Schemas over one tokenizer. end_ids: tokens that may end an answer. Any thread may use it."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._lock = threading.Lock()
        self._made: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # matchers at their start, the latest last

    def guide(self, schema: str) -> SchemaGuide:
        """For one answer. The first one costs a second, one of a schema seen lately next to nothing.

        Raises SchemaError for a schema that can't be kept to.
        """
        from llguidance import LLMatcher

        with self._lock:
            if (known := self._compiled.get(schema)) is not None:
                self._compiled.move_to_end(schema)
                return SchemaGuide(known.deep_copy(), self._end_ids)
        try:
            json.loads(schema)
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)
            if not (error := LLMatcher.validate_grammar(grammar, self._of_tokenizer())):
                matcher = LLMatcher(self._of_tokenizer(), grammar)
                (trial := matcher.deep_copy()).compute_bitmask()  # some give up at their first token only
                if not (error := _first_line(trial.get_error() if trial.is_error() else "")):
                    with self._lock:
                        self._compiled[schema] = matcher
                        while len(self._compiled) > _NUM_KEPT:
                            self._compiled.popitem(last=False)
                    return SchemaGuide(matcher.deep_copy(), self._end_ids)
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


def _first_line(error: str) -> str:
    """The rest is a dump of the answer and the schema, which are a client's."""
    return error.strip().split("\n", 1)[0][:200]


class SchemaGuide:
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
            self.error = self.error or _first_line(str(err))
            keep[list(self._end_ids)] = True
        logits[~keep.to(logits.device)] = float("-inf")
