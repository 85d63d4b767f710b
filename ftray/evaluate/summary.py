"""Metrics, differences, slices and the verdict of an evaluation. Pure functions; no models, Ray or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftray import config
from ftray.config import FIGURES
from ftray.evaluate import metrics
from ftray.evaluate.metrics import Floats, Statistic
from ftray.evaluate.results import ModelScores
from ftray.evaluate.stats import Difference, difference

COSTS = {"loss", "perplexity", "token_accuracy"}  # metrics over examples; the others are over answers
MIN_EXAMPLES = 30  # for a verdict
MIN_CHANGE = 0.005  # for a verdict: of the loss, or of a score between 0 and 1
OUT_OF_100 = ("bleu", "chrf")  # scores between 0 and 100
MODELS = {"base": "base", "few_shot": "few-shot base", "tuned": "tuned model"}


def costs_of(tokens: Floats, general: Floats) -> dict[str, Statistic]:
    """Loss metrics of a model. tokens, general: see `score.ScoreResult`."""
    figures = metrics.loss_figures(*tokens.T)
    if len(general):
        figures["general_loss"] = metrics.loss_figures(*general.T)["loss"]
    return figures


def answers_of(
    section: config.EvaluateConfig,
    answers: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str],
    schema: Any,
) -> dict[str, Statistic]:
    """The configured metrics of a model's answers."""
    wanted = section.metrics
    statistics: dict[str, Statistic] = {}
    if not answers:
        return {}
    if "rouge" in wanted:
        statistics |= metrics.rouge(answers, references)
    if "bleu" in wanted:
        statistics["bleu"] = metrics.bleu(answers, references)
    if "chrf" in wanted:
        statistics["chrf"] = metrics.chrf(answers, references)
    if section.bertscore_model is not None:
        statistics["bertscore"] = metrics.bertscore(answers, references, section.bertscore_model)
    if "exact" in wanted:
        statistics["exact_match"] = metrics.exact_match(answers, references)
    if section.extract is not None:
        statistics["extracted_match"] = metrics.extracted_match(answers, references, section.extract)
    if section.format is not None:
        statistics["format"] = metrics.format_score(answers, section.format)
    if "json" in wanted:
        statistics["json_valid"] = metrics.json_valid(answers, schema)
    if "classes" in wanted:
        statistics |= metrics.classify(answers, references, labels)
    return statistics


def scores_of(figures: Mapping[str, Statistic], tokens: Floats) -> ModelScores:
    """Metrics over all examples and answers."""
    num_answers = max(
        (len(s.sums) for name, s in figures.items() if FIGURES[name].of not in ("loss", "general")), default=0
    )
    values = {name: statistic.over() for name, statistic in figures.items()}
    return ModelScores(
        num_trained_tokens=int(tokens[:, 2].sum()), num_examples=len(tokens), num_answers=num_answers, **values
    )


def differences_of(new: Mapping[str, Statistic], old: Mapping[str, Statistic]) -> dict[str, Difference]:
    """Differences of two models' metrics over the same examples, in the order of FIGURES."""
    return {
        name: difference(new[name], old[name])
        for name in FIGURES
        if name in new and name in old and len(new[name].sums) == len(old[name].sums)
    }


def pick(figures: Mapping[str, Statistic], examples: Sequence[int], answers: Sequence[int]) -> dict[str, Statistic]:
    """The metrics over a subset of examples and answers, without the general set."""
    selected = {}
    for name, statistic in figures.items():
        places = np.asarray(examples if name in COSTS else answers, np.int64)
        if len(places) and name != "general_loss":
            scores = [statistic.scores[i] for i in places] if statistic.scores is not None else None
            selected[name] = Statistic(statistic.sums[places], statistic.value, scores)
    return selected


def slices_of(
    column: str,
    groups: Sequence[str | None],
    answered: Sequence[int],
    models: Mapping[str, Mapping[str, Statistic]],
) -> dict[str, Any]:
    """Metrics and differences of each group, and the spread between the best and the worst group.

    Args:
        column: Name of the column.
        groups: Group of each example.
        answered: Index of the example of each answer.
        models: Metrics of each model.
    """
    table: dict[str, Any] = {}
    for group in sorted({g or "" for g in groups}):
        examples = [i for i, g in enumerate(groups) if (g or "") == group]
        own = set(examples)
        answers = [k for k, i in enumerate(answered) if i in own]
        parts = {name: pick(models[name], examples, answers) for name in ("base", "tuned")}
        table[group or "(none)"] = {
            "num_examples": len(examples),
            "num_answers": len(answers),
            **{name: {figure: s.over() for figure, s in part.items()} for name, part in parts.items()},
            "difference": differences_of(parts["tuned"], parts["base"]),
        }
    spread = {
        figure: {
            name: max(values) - min(values)
            for name in ("base", "tuned")
            if (values := [t[name][figure] for t in table.values() if figure in t[name]])
        }
        for figure in models["tuned"]
        if figure != "general_loss"
    }
    return {"column": column, "groups": table, "spread": spread}


def pairs_of(pairs: Sequence[tuple[str, str]], answers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Share of pairs that each model answers identically, and the mean ROUGE-L between the two answers.

    Args:
        pairs: Pairs of prompts (a, b).
        answers: Answers of each model to a, b, a, b, …
    """
    consistency: dict[str, Any] = {"num": len(pairs)}
    for name, texts in answers.items():
        first, second = list(texts[0::2]), list(texts[1::2])
        alike = metrics.rouge(second, first)["rouge_l"]
        consistency[name] = {"same": metrics.exact_match(first, second).over(), "rouge_l": alike.over()}
    return consistency


def verdict_of(differences: Mapping[str, Mapping[str, Difference]], eval_data: str = "") -> list[str]:
    """One sentence per pair of models: the metrics that are better, worse, or not clearly different.

    Args:
        differences: Differences of each pair, "tuned - base" for example, by metric.
        eval_data: The eval data, as the sentences name it.
    """
    where = f"on {eval_data}, " if eval_data else ""
    return [where + _verdict(pair, of_pair) for pair, of_pair in differences.items() if of_pair]


def _verdict(pair: str, differences: Mapping[str, Difference]) -> str:
    new, _, old = pair.partition(" - ")
    sides: dict[str, list[str]] = {}
    for name, change in differences.items():
        if name != "perplexity":  # a function of the loss
            sides.setdefault(_side_of(name, change), []).append(FIGURES[name].title)
    parts = [f"{side} by {', '.join(sides[side])}" for side in ("better", "worse") if side in sides]
    text = f"the {MODELS[new]} is {'; '.join(parts)}" if parts else f"the {MODELS[new]} is neither better nor worse"
    text += f" than the {MODELS[old]}"
    reasons = {
        "unsure": "no statistically significant difference in",
        "small": f"less than {MIN_CHANGE:.1%} of difference in",
        "few": f"fewer than {MIN_EXAMPLES} examples, which is too few to compare",
    }
    return text + "".join(f"; {reason} {', '.join(sides[side])}" for side, reason in reasons.items() if side in sides)


def _side_of(name: str, difference: Difference) -> str:
    """`better`, `worse`, or why neither can be said: `few` examples, `unsure`, `small`."""
    if difference.num < MIN_EXAMPLES:
        return "few"
    if not difference.is_sure:
        return "unsure"
    is_loss = not FIGURES[name].higher_is_better
    change = difference.ratio if is_loss and difference.ratio is not None else difference.difference
    if abs(change) < MIN_CHANGE * (100 if name in OUT_OF_100 else 1):
        return "small"
    return "better" if (difference.difference > 0) == FIGURES[name].higher_is_better else "worse"
