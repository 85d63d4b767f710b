"""Private APIs of sacrebleu and bert-score. Seen with sacrebleu 2.5 and 2.6, bert-score 0.3.13; tests/unit/test_compat.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def corpus_statistics(metric: Any, answers: Sequence[str], references: Sequence[str]) -> list[list[float]]:
    """The counts of each answer, whose sum over a corpus gives its score.

    Reason: intervals are bootstrapped from these counts; sacrebleu's own bootstrap returns no samples, and cannot pair two
    models.
    """
    statistics: list[list[float]] = metric._extract_corpus_statistics(list(answers), [list(references)])
    return statistics


def score_of(metric: Any, statistics: list[float]) -> float:
    """The corpus score of summed `corpus_statistics`. Reason: as there."""
    return float(metric._compute_score_from_stats(statistics).score)


def limit_tokens(scorer: Any, max_tokens: int) -> None:
    """Makes a BERTScorer cut texts at the model's own limit.

    Reason: if a tokenizer names no limit, bert-score cuts at 10^30 tokens, which fast tokenizers refuse. The tokenizer has no
    public name.
    """
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, max_tokens)
