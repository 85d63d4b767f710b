"""Metrics of answers: pure functions of texts, with the libraries' own implementations where they exist.

Every metric, whether a mean over answers or one number over the corpus, is computed from sums over examples (`Statistic`), so
that one bootstrap works for all of them.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ftray.compat.metrics import corpus_statistics, limit_tokens, score_of

Floats = npt.NDArray[np.float64]
OTHER = "(other)"  # an answer that is not a label


@dataclass(frozen=True)
class Statistic:
    """A metric over examples.

    Attributes:
        sums: float64 [examples, k], the numbers of each example that are summed.
        value: Computes the metric [...] from sums [..., k].
        scores: The score of each example, or None if it is not meaningful (macro F1).
    """

    sums: Floats
    value: Callable[[Floats], Floats]
    scores: list[float] | None = None

    def over(self, places: npt.NDArray[np.int64] | slice = slice(None)) -> float:
        """The metric over some or all examples."""
        return float(self.value(self.sums[places].sum(axis=0)))


def _ratio(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):  # nan without examples
        return np.asarray(sums[..., 0] / sums[..., 1])


def _exp_ratio(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):  # infinity on overflow
        return np.asarray(np.exp(_ratio(sums)))


def mean_of(scores: Sequence[float]) -> Statistic:
    """The mean of a score per example."""
    values = np.asarray(scores, np.float64)
    return Statistic(np.stack([values, np.ones_like(values)], axis=-1), _ratio, values.tolist())


def loss_figures(losses: Floats, hits: Floats, counts: Floats) -> dict[str, Statistic]:
    """Loss, perplexity and token accuracy over all trained tokens.

    Args:
        losses: float64 [examples], summed cross-entropy in nats.
        hits: float64 [examples], correctly predicted tokens.
        counts: float64 [examples], trained tokens.
    """
    loss, accuracy = np.stack([losses, counts], axis=-1), np.stack([hits, counts], axis=-1)
    return {
        "loss": Statistic(loss, _ratio, _ratio(loss).tolist()),
        "perplexity": Statistic(loss, _exp_ratio, _exp_ratio(loss).tolist()),
        "token_accuracy": Statistic(accuracy, _ratio, _ratio(accuracy).tolist()),
    }


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, Statistic]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 (Lin 2004), with Porter stemming, as rouge-score computes them; 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()), use_stemmer=True)
    results = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    return {name: mean_of([float(r[key].fmeasure) for r in results]) for name, key in names.items()}


def bleu(answers: Sequence[str], references: Sequence[str]) -> Statistic:
    """BLEU over the corpus (Papineni et al. 2002) with sacrebleu's defaults; 0 to 100. scores: sentence BLEU."""
    from sacrebleu.metrics import BLEU

    alone = BLEU(effective_order=True)
    scores = [float(alone.sentence_score(a, [r]).score) for a, r in zip(answers, references, strict=True)]
    return _of_sacrebleu(BLEU(), answers, references, scores)


def chrf(answers: Sequence[str], references: Sequence[str]) -> Statistic:
    """chrF2 over the corpus (Popović 2015) with sacrebleu's defaults; 0 to 100. scores: sentence chrF."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    scores = [float(metric.sentence_score(a, [r]).score) for a, r in zip(answers, references, strict=True)]
    return _of_sacrebleu(metric, answers, references, scores)


def _of_sacrebleu(metric: Any, answers: Sequence[str], references: Sequence[str], scores: list[float]) -> Statistic:
    """Uses the two functions of sacrebleu's own bootstrap."""
    sums = np.asarray(corpus_statistics(metric, answers, references), np.float64)

    def value(sums: Floats) -> Floats:
        rows = sums.reshape(-1, sums.shape[-1])
        values = [score_of(metric, row.tolist()) for row in rows]
        return np.asarray(values, np.float64).reshape(sums.shape[:-1])

    return Statistic(sums, value, scores)


def bertscore(answers: Sequence[str], references: Sequence[str], model: str) -> Statistic:
    """BERTScore F1 (Zhang et al. 2020) by the last layer of an encoder, without idf. Empty answers score 0.

    Needs the extra `bertscore`.

    Args:
        answers: Answers.
        references: A reference for each answer.
        model: Directory of the encoder.
    """
    from bert_score import BERTScorer
    from transformers import AutoConfig

    scores = np.zeros(len(answers))
    nonempty = [i for i, a in enumerate(answers) if a.strip() and references[i].strip()]
    if nonempty:
        encoder = AutoConfig.from_pretrained(model, local_files_only=True)
        scorer = BERTScorer(model_type=model, num_layers=encoder.num_hidden_layers)
        limit_tokens(scorer, encoder.max_position_embeddings)
        _, _, f1 = scorer.score([answers[i] for i in nonempty], [references[i] for i in nonempty])
        scores[nonempty] = f1.numpy()
    return mean_of(scores.tolist())


def exact_match(answers: Sequence[str], references: Sequence[str]) -> Statistic:
    """1 for each answer that equals its reference, ignoring surrounding whitespace."""
    return mean_of([float(a.strip() == r.strip()) for a, r in zip(answers, references, strict=True)])


def extracted_match(answers: Sequence[str], references: Sequence[str], pattern: str) -> Statistic:
    """1 for each answer with the same match of the pattern as its reference (see `extract`).

    If the reference has no match, the whole reference is compared.
    """
    pairs = [(extract(a, pattern), extract(r, pattern)) for a, r in zip(answers, references, strict=True)]
    wanted = [_plain_result(r) if match is None else match for r, (_, match) in zip(references, pairs, strict=True)]
    return mean_of([float(match is not None and match == w) for (match, _), w in zip(pairs, wanted, strict=True)])


def extract(text: str, pattern: str) -> str | None:
    """The pattern's first match (its first group, if any). Numbers lose commas, currency signs and a final period."""
    match = re.search(pattern, text)
    if match is None:
        return None
    return _plain_result(match[1] if match.re.groups and match[1] is not None else match[0])


def _plain_result(text: str) -> str:
    """A stripped text. Numbers are normalized: `$1,200.0.` becomes `1200`."""
    plain = text.strip()
    number = re.fullmatch(r"([-+]?)[$€£]?([-+]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)\.?%?", plain)
    if number is None:
        return plain
    value = Decimal(number[3].replace(",", ""))
    sign = "-" if value and "-" in number[1] + number[2] else ""
    return f"{sign}{value.normalize():f}" if value else "0"


def format_score(answers: Sequence[str], pattern: str) -> Statistic:
    """1 for each answer that matches the regular expression as a whole, else 0."""
    compiled = re.compile(pattern)
    return mean_of([float(compiled.fullmatch(answer) is not None) for answer in answers])


def json_valid(answers: Sequence[str], schema: Any = None) -> Statistic:
    """1 for each answer that is JSON and valid under the schema (by jsonschema; None: any JSON), else 0."""
    from jsonschema.validators import validator_for

    validator = validator_for(schema)(schema) if schema is not None else None

    def score(answer: str) -> float:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator is None or validator.is_valid(value))

    return mean_of([score(answer) for answer in answers])


def read_label(answer: str, labels: Sequence[str]) -> str:
    """The label that an answer equals, or OTHER.

    Case and surrounding whitespace and punctuation are ignored, unless two labels differ only in these.
    """
    for plain in (str.strip, _ended, _bare):
        forms = Counter(plain(label) for label in dict.fromkeys(labels))
        by_form = {plain(label): label for label in labels if forms[plain(label)] == 1 and plain(label)}
        if plain(answer) in by_form:
            return by_form[plain(answer)]
    return OTHER


def _ended(text: str) -> str:
    return text.strip().rstrip(".!,;:").casefold()


def _bare(text: str) -> str:
    return text.strip().strip(string.punctuation + string.whitespace).casefold()


def classify(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> dict[str, Statistic]:
    """Accuracy, and F1 averaged over the labels that occur in references or answers; as scikit-learn computes them."""
    place = {label: i for i, label in enumerate([*labels, OTHER])}
    wanted = np.array([place[read_label(r, labels)] for r in references], np.int64)
    predicted = np.array([place[read_label(a, labels)] for a in answers], np.int64)
    hits = (wanted == predicted) & (wanted < len(labels))
    columns = np.eye(len(place))[:, : len(labels)]  # OTHER is not a class and has no column
    sums = np.concatenate([columns[wanted] * hits[:, None], columns[wanted], columns[predicted]], axis=1)
    return {
        "accuracy": mean_of(hits.astype(np.float64).tolist()),
        "macro_f1": Statistic(sums, partial(_macro_f1, num_labels=len(labels))),
    }


def _macro_f1(sums: Floats, num_labels: int) -> Floats:
    right, wanted, predicted = (sums[..., i * num_labels : (i + 1) * num_labels] for i in range(3))
    occurs = wanted + predicted > 0
    f1 = np.divide(2 * right, wanted + predicted, out=np.zeros_like(right), where=occurs)
    return np.asarray(f1.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1))


def class_table(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and count of each label, and the confusion matrix (rows: references), by scikit-learn."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    wanted, predicted = ([read_label(text, labels) for text in texts] for texts in (references, answers))
    names = ("precision", "recall", "f1", "num")
    columns = precision_recall_fscore_support(wanted, predicted, labels=list(labels), zero_division=0)
    rows = {
        label: dict(zip(names, values, strict=True))
        for label, *values in zip(labels, *(f.tolist() for f in columns), strict=True)
    }
    matrix = confusion_matrix(wanted, predicted, labels=[*labels, OTHER])
    return {"labels": [*labels, OTHER], "per_class": rows, "confusion": matrix.tolist()}


def perplexity(loss: float) -> float:
    """exp(loss), or infinity on overflow."""
    return math.exp(loss) if loss < 700 else math.inf
