"""Writes docs/compatibility.md, which settings go together, from the table that `ftray check` carries out."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from ftray.config.constraints import CHOICES, RULES, Rule, impossible

PAGE = Path(__file__).with_name("compatibility.md")
HEAD = """\
<!-- Made by `python docs/make_compatibility.py` from ftray/config/constraints.py; a unit test says when it is out of date. -->

# Which settings go together

`ftray check` refuses the pairs below and names the alternative. Everything else goes together; the tests train a step of
settings that cover every other pair, on CPUs.

| setting | with | why not | instead |
|---|---|---|---|"""
GRID = """
What is possible for each method and ZeRO stage: precisions, and what may be offloaded to the host's memory.

| method.type | stage 0 | stage 1 | stage 2 | stage 3 |
|---|---|---|---|---|"""


def sections(chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of a run file with the chosen values, and the first of `CHOICES` for the rest."""
    tree: dict[str, dict[str, Any]] = {}
    for key, values in CHOICES.items():
        section, leaf = key.split(".")
        tree.setdefault(section, {})[leaf] = chosen.get(key, values[0])
    return tree


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(_rule, RULES), GRID, *_grid(), ""])


def _rule(rule: Rule) -> str:
    sides = [f"`{key}` {_words(values)}" for key, values in (rule.first, rule.second)]
    return f"| {sides[0]} | {sides[1]} | {rule.reason} | {rule.instead} |"


def _words(values: tuple[Any, ...]) -> str:
    if values == (True,):
        return "set"
    return ", ".join(map(str, values[:-1])) + (" or " if len(values) > 1 else "") + str(values[-1])


def _grid() -> Iterator[str]:
    for method in CHOICES["method.type"]:
        cells = [_cell(method, stage) for stage in CHOICES["deepspeed.zero_stage"]]
        yield f"| `{method}` | {' | '.join(cells)} |"


def _cell(method: str, stage: int) -> str:
    precisions, places = [], []
    for precision, place in product(CHOICES["train.precision"], CHOICES["deepspeed.offload"]):
        chosen = {
            "method.type": method,
            "deepspeed.zero_stage": stage,
            "train.precision": precision,
            "deepspeed.offload": place,
        }
        if impossible(sections(chosen)) is None:
            precisions.append(precision)
            places.append(place)
    if not precisions:
        return "–"
    return f"{', '.join(dict.fromkeys(precisions))}; offload {', '.join(dict.fromkeys(places))}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
