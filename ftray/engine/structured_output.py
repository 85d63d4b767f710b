"""Structured output: masks tokens that would violate a JSON schema or a grammar. Uses a tokenizer and llguidance; no model.

Both engines generate JSON without whitespace between its parts, so that a model cannot fill its answer with blanks.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from ftray.engine.protocol import SamplingParams, SchemaError

_COMPACT = {"whitespace_flexible": False}
_NUM_KEPT = 32  # compiled schemas and grammars


class SchemaCompiler:
    """Compiles schemas and grammars for one tokenizer. Thread-safe.

    Args:
        tokenizer: A Hugging Face tokenizer.
        vocab_size: Size of the model's vocabulary.
        end_ids: Tokens that may end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._lock = threading.Lock()
        self._llg_tokenizer: Any = None
        self._compiled: OrderedDict[tuple[str, bool], Any] = (
            OrderedDict()
        )  # matchers in their initial state, most recently used last

    def guide_for(self, params: SamplingParams) -> SchemaGuide | None:
        """The guide of a request, if its answer is constrained. Raises SchemaError."""
        if params.json_schema is not None:
            return self.guide(params.json_schema)
        return None if params.grammar is None else self.guide(params.grammar, is_grammar=True)

    def guide(self, source: str, *, is_grammar: bool = False) -> SchemaGuide:
        """A guide for one answer. The first one takes a second; recently used ones are cached.

        Args:
            source: A JSON schema.
            is_grammar: Whether source is a grammar in llguidance's variant of Lark instead.

        Raises:
            SchemaError: It is invalid or cannot be satisfied.
        """
        from llguidance import LLMatcher

        key = (source, is_grammar)
        with self._lock:
            if (known := self._compiled.get(key)) is not None:
                self._compiled.move_to_end(key)
                return SchemaGuide(known.deep_copy(), self._end_ids)
        try:
            if is_grammar:
                grammar = LLMatcher.grammar_from_lark(source)
            else:
                json.loads(source)
                grammar = LLMatcher.grammar_from_json_schema(source, defaults=_COMPACT)
            if not (error := LLMatcher.validate_grammar(grammar, self._load_tokenizer())):
                matcher = LLMatcher(self._load_tokenizer(), grammar)
                (trial := matcher.deep_copy()).compute_bitmask()  # some schemas fail only at their first token
                if not (error := _first_line(trial.get_error() if trial.is_error() else "")):
                    with self._lock:
                        self._compiled[key] = matcher
                        while len(self._compiled) > _NUM_KEPT:
                            self._compiled.popitem(last=False)
                    return SchemaGuide(matcher.deep_copy(), self._end_ids)
        except (ValueError, TypeError, RecursionError) as err:
            error = str(err)
        what = "the grammar of the answer" if is_grammar else "the JSON schema"
        raise SchemaError(f"{what} cannot be satisfied: {' '.join(error.split())[:200]}")

    def _load_tokenizer(self) -> Any:
        with self._lock:
            if self._llg_tokenizer is None:
                from llguidance.hf import from_tokenizer

                n_vocab = max(self._vocab_size, len(self._tokenizer))
                self._llg_tokenizer = from_tokenizer(self._tokenizer, n_vocab, list(self._end_ids) or None)
            return self._llg_tokenizer


def _first_line(error: str) -> str:
    """Drops the rest, a dump of the client's answer and schema."""
    return error.strip().split("\n", 1)[0][:200]


class SchemaGuide:
    """The state of one answer in its schema.

    Attributes:
        error: The reason why the schema cannot be followed any further; the answer must then end.
    """

    def __init__(self, matcher: Any, end_ids: tuple[int, ...]) -> None:
        self._matcher, self._end_ids = matcher, end_ids
        self._num_consumed: int | None = None  # tokens of prompt and answer
        self.error: str | None = None

    def mask(self, logits: torch.Tensor, token_ids: list[int]) -> None:
        """Sets the logits of tokens that would violate the schema to -inf.

        Never raises, because an error of one request would end the engine. If the matcher fails, only end tokens are allowed.

        Args:
            logits: float [vocab], changed in place.
            token_ids: Prompt and answer so far.
        """
        if self._num_consumed is None:
            self._num_consumed = len(token_ids)
        new, self._num_consumed = token_ids[self._num_consumed :], len(token_ids)
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
