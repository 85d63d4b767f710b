"""Scores of answers. Pure functions of texts; the libraries' own implementations where there is one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each answer (Lin 2004), with Porter stemming, as rouge-score computes it; 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score(r, a)["rougeL"].fmeasure) for a, r in zip(answers, references, strict=True)]


def format_score(answers: Sequence[str], pattern: str) -> list[float]:
    """1 for each answer that matches the regular expression as a whole, else 0."""
    compiled = re.compile(pattern)
    return [float(compiled.fullmatch(answer) is not None) for answer in answers]


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
