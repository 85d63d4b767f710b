"""Which settings go together: impossible pairs are refused with their alternative, every other pair trains a step."""

from __future__ import annotations

import random
import runpy
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from ftray.config.constraints import CHOICES, RULES, Rule, impossible
from ftray.errors import ConfigError
from ftray.train.zero import engine as zero_engine
from tests import cluster, ranks, tiny

ROOT = Path(__file__).parents[2]
PAGE = runpy.run_path(str(ROOT / "docs" / "make_compatibility.py"))
Chosen = dict[str, Any]


def run_of(root: Path, chosen: Chosen) -> Any:
    settings = {key.replace(".", "__"): value for key, value in chosen.items()}
    settings["deepspeed__overrides"] = ranks.SHARD_ALL if chosen.get("deepspeed.zero_stage") == 3 else {}
    return cluster.make_run(root, root / "model", root, train__global_batch_size=2, **settings)


def is_possible(chosen: Chosen) -> bool:
    return impossible(PAGE["sections"](chosen)) is None


def refused_pairs() -> list[tuple[Rule, Chosen]]:
    """Every pair of values that a rule names, with what makes the rest of it possible."""
    pairs = []
    for rule in RULES:
        (a, first), (b, second) = rule.first, rule.second
        for x, y in product(first, second):
            chosen = {a: x, b: y}
            if chosen.get("method.freeze") is True:
                chosen["method.freeze"] = ["lm_head"]
            if "method.dora" in chosen or "method.rslora" in chosen:
                chosen.setdefault("method.type", "lora")
            if "method.base_precision" in chosen:
                chosen = {"method.type": "lora", "train.precision": "bf16", **chosen}
            pairs.append((rule, chosen))
    return pairs


def named(value: Any) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("rule", "chosen"), refused_pairs(), ids=named)
def test_an_impossible_pair_is_refused_naming_the_alternative(tmp_path: Path, rule: Rule, chosen: Chosen) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(tmp_path, chosen)
    assert rule.first[0] in str(caught.value)
    assert rule.second[0] in str(caught.value)
    assert rule.instead in str(caught.value)


def test_a_pair_that_no_rule_names_is_taken(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"method.type": "full", "deepspeed.zero_stage": 1, "deepspeed.offload": "optimizer"})
    assert run.deepspeed.offload == "optimizer"
    assert run_of(tmp_path, {"method.type": "full", "method.freeze": []}).method.freeze == []


def test_the_page_is_what_the_table_says() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert text == PAGE["render"](), "write it anew: python docs/make_compatibility.py"


def all_pairs(choices: dict[str, tuple[Any, ...]]) -> list[Chosen]:
    """Possible settings that together hold every possible pair of values, found greedily; the same ones every time."""
    rng = random.Random(0)
    keys = list(choices)
    everything = [dict(zip(keys, values, strict=True)) for values in product(*choices.values())]
    possible = [chosen for chosen in everything if is_possible(chosen)]
    open_pairs = {pair for chosen in possible for pair in pairs_of(chosen)}
    found: list[Chosen] = []
    while open_pairs:
        best = max(rng.sample(possible, len(possible)), key=lambda chosen: len(open_pairs & pairs_of(chosen)))
        open_pairs -= pairs_of(best)
        found.append(best)
    return found


def pairs_of(chosen: Chosen) -> set[tuple[str, ...]]:
    return {(a, str(chosen[a]), b, str(chosen[b])) for a, b in combinations(chosen, 2)}


def train_a_step(rank: int, root: Path, settings: list[Chosen]) -> list[tuple[float, float, bool]]:
    """Loss of a batch before and after four steps on it, and whether a step was left out."""
    ranks.lift_fp16_gate()
    zero_engine.check_device = lambda *_: None  # products in 8 bits on a CPU, too: the same numbers, not their speed
    found = []
    for chosen in settings:
        engine, _ = ranks.build_engine(run_of(root, chosen))
        losses = [ranks.train_steps(engine, 0, 1)[0] for _ in range(5)]
        found.append((losses[0], losses[-1], bool(getattr(engine.optimizer, "overflow", False))))
        engine.destroy()
    return found


@pytest.mark.long
def test_settings_that_cover_every_possible_pair_learn(tmp_path: Path) -> None:
    tiny.write_tiny_model(tmp_path / "model")
    settings = all_pairs(CHOICES)
    assert 10 < len(settings) < 40
    kinds = {(chosen["method.base_precision"], chosen["method.type"]) for chosen in settings}
    assert {("fp8", "full"), ("fp8", "lora"), ("int8", "lora")} < kinds
    for chosen, (before, after, skipped) in zip(
        settings, ranks.run_ranks(2, train_a_step, tmp_path, settings)[0], strict=True
    ):
        assert after < 0.999 * before, chosen
        assert not skipped, chosen
