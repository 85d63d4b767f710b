"""From what models cost and answered to figures, differences, groups and a verdict. Pure; no models, no Ray, no files."""

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

COSTS = {"loss", "perplexity", "token_accuracy"}  # figures over examples; the others are over answers
MODELS = {"base": "base", "few_shot": "few-shot base", "tuned": "tuned model"}


def costs_of(tokens: Floats, general: Floats) -> dict[str, Statistic]:
    """Figures of what records cost a model. tokens, general: as in `score.Scored`."""
    found = metrics.loss_figures(*tokens.T)
    if len(general):
        found["general_loss"] = metrics.loss_figures(*general.T)["loss"]
    return found


def answers_of(
    section: config.EvaluateConfig,
    answers: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str],
    schema: Any,
) -> dict[str, Statistic]:
    """Figures of a model's answers, as far as `metrics` asks for them."""
    wanted = section.metrics
    found: dict[str, Statistic] = {}
    if not answers:
        return {}
    if "rouge" in wanted:
        found |= metrics.rouge(answers, references)
    if "bleu" in wanted:
        found["bleu"] = metrics.bleu(answers, references)
    if "chrf" in wanted:
        found["chrf"] = metrics.chrf(answers, references)
    if section.bertscore_model is not None:
        found["bertscore"] = metrics.bertscore(answers, references, section.bertscore_model)
    if "exact" in wanted:
        found["exact_match"] = metrics.exact_match(answers, references)
    if section.extract is not None:
        found["extracted_match"] = metrics.extracted_match(answers, references, section.extract)
    if section.format is not None:
        found["format"] = metrics.format_score(answers, section.format)
    if "json" in wanted:
        found["json_valid"] = metrics.json_valid(answers, schema)
    if "classes" in wanted:
        found |= metrics.classify(answers, references, labels)
    return found


def scores_of(figures: Mapping[str, Statistic], tokens: Floats) -> ModelScores:
    """The figures over all examples and answers."""
    num_answers = max(
        (len(s.sums) for name, s in figures.items() if FIGURES[name].of not in ("loss", "general")), default=0
    )
    values = {name: statistic.over() for name, statistic in figures.items()}
    return ModelScores(
        num_trained_tokens=int(tokens[:, 2].sum()), num_examples=len(tokens), num_answers=num_answers, **values
    )


def differences_of(new: Mapping[str, Statistic], old: Mapping[str, Statistic]) -> dict[str, Difference]:
    """One model's figures less another's, in the order of FIGURES, where both have them over the same examples."""
    return {
        name: difference(new[name], old[name])
        for name in FIGURES
        if name in new and name in old and len(new[name].sums) == len(old[name].sums)
    }


def pick(figures: Mapping[str, Statistic], examples: Sequence[int], answers: Sequence[int]) -> dict[str, Statistic]:
    """The same figures over some of the examples and some of the answers; without the general set."""
    found = {}
    for name, statistic in figures.items():
        places = np.asarray(examples if name in COSTS else answers, np.int64)
        if len(places) and name != "general_loss":
            scores = [statistic.scores[i] for i in places] if statistic.scores is not None else None
            found[name] = Statistic(statistic.sums[places], statistic.value, scores)
    return found


def slices_of(
    column: str,
    groups: Sequence[str | None],
    answered: Sequence[int],
    models: Mapping[str, Mapping[str, Statistic]],
) -> dict[str, Any]:
    """Every figure for each group, tuned less base there, and for each model how far the best and worst group are apart.

    groups: of each example; answered: the example that each answer belongs to.
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
    """Of each model: the share of pairs that it answers alike, word for word, and their mean ROUGE-L to each other.

    answers: of each model, to a, b, a, b, …
    """
    found: dict[str, Any] = {"num": len(pairs)}
    for name, said in answers.items():
        first, second = list(said[0::2]), list(said[1::2])
        alike = metrics.rouge(second, first)["rouge_l"]
        found[name] = {"same": metrics.exact_match(first, second).over(), "rouge_l": alike.over()}
    return found


def verdict_of(differences: Mapping[str, Mapping[str, Difference]]) -> list[str]:
    """A sentence for each pair of models: what is better, what is worse, what can't be told."""
    return [_verdict(pair, found) for pair, found in differences.items() if found]


def _verdict(pair: str, found: Mapping[str, Difference]) -> str:
    new, _, old = pair.partition(" - ")
    sides: dict[str, list[str]] = {"better": [], "worse": [], "unsure": []}
    for name, d in found.items():
        if name == "perplexity":
            continue  # says the same as the loss
        side = (
            "unsure" if not d.is_sure else "better" if (d.difference > 0) == FIGURES[name].higher_is_better else "worse"
        )
        sides[side].append(FIGURES[name].title)
    parts = [f"{side} by {', '.join(names)}" for side, names in sides.items() if names and side != "unsure"]
    text = f"the {MODELS[new]} is {'; '.join(parts)}" if parts else f"the {MODELS[new]} is neither better nor worse"
    unsure = f"; no difference that 95% intervals can tell by {', '.join(sides['unsure'])}" if sides["unsure"] else ""
    return f"{text} than the {MODELS[old]}{unsure}"
