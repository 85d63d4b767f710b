"""The sheet: which questions people see, in which order, and whose answer stands on which side.

A pure function of the answers and of evaluate.human. Sheet and key are kept apart: what a rater may see, and which side
is the tuned model's. Knows neither raters nor pages.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from ftray import config, storage
from ftray.data.order import key as hash_of
from ftray.errors import ConfigError
from ftray.evaluate.results import Generation, read_generations

Side = Literal["a", "b"]


@dataclass(frozen=True)
class SheetItem:
    """One question of the sheet and two answers to it."""

    question: str
    reference: str
    a: str
    b: str


@dataclass(frozen=True)
class Sheet:
    """What raters see. id: changes whenever anything of it, or of its key, does. Samples are counted from 1."""

    id: str
    criteria: list[str]
    samples: list[SheetItem]


@dataclass(frozen=True)
class SheetKey:
    """What raters must not see. tuned: the tuned model's side of each sample. slices: of each sample, "" without.

    sheet: its id. token: opens the page; kept, so that its address is the same when the server is started again.
    """

    sheet: str
    tuned: list[Side]
    slices: list[str]
    token: str


def build_sheet(generations: Sequence[Generation], human: config.HumanEvalConfig) -> tuple[Sheet, SheetKey]:
    """Picks, shuffles and blinds. Each slice gets its share of the samples, at least one where there is room.

    The tuned model stands on each side in half of the samples (of an odd number: give or take one), within each slice
    give or take two.
    """
    slices = [g.slice for g in generations]
    ranks = [hash_of(human.seed, "pick", g.question, g.reference, i) for i, g in enumerate(generations)]
    picked: list[int] = []  # slice after slice
    for name, share in _shares(slices, min(human.samples, len(slices))).items():
        picked += sorted((i for i, s in enumerate(slices) if s == name), key=lambda i: ranks[i])[:share]
    is_first = {}
    for at, i in enumerate(picked):  # a coin says which of two neighbours has the tuned model on side a
        coin = hash_of(human.seed, "side", ranks[picked[at - at % 2]])[0] % 2
        is_first[i] = (at + coin) % 2 == 0
    order = sorted(picked, key=lambda i: hash_of(human.seed, "show", ranks[i]))
    samples, tuned = [], list[Side]()
    for i in order:
        g = generations[i]
        samples.append(SheetItem(g.question, g.reference, *((g.tuned, g.base) if is_first[i] else (g.base, g.tuned))))
        tuned.append("a" if is_first[i] else "b")
    criteria = list(human.criteria)
    name = hash_of(json.dumps([criteria, [asdict(s) for s in samples], tuned])).hex()
    return Sheet(name, criteria, samples), SheetKey(name, tuned, [slices[i] for i in order], secrets.token_urlsafe(12))


def _shares(slices: Sequence[str], number: int) -> dict[str, int]:
    """How many of `number` samples each slice gets: in proportion, by largest remainders, none of nothing if possible."""
    counts = {name: slices.count(name) for name in sorted(set(slices))}
    exact = {name: number * count / len(slices) for name, count in counts.items()}
    least = 1 if number >= len(counts) else 0
    shares = {name: max(least, int(share)) for name, share in exact.items()}
    while (over := sum(shares.values()) - number) != 0:
        step = -1 if over > 0 else 1
        movable = [n for n in shares if least <= shares[n] + step <= counts[n]]
        name = max(movable, key=lambda n: (step * (exact[n] - shares[n]), n))
        shares[name] += step
    return shares


def directory_of(run_dir: str) -> str:
    """Where sheet, key, answers and results of a run are."""
    return storage.join(run_dir, "evaluate", "human")


def open_sheet(run_dir: str, human: config.HumanEvalConfig) -> tuple[Sheet, SheetKey]:
    """The sheet of these settings: the one that is there, or a new one, which is written.

    Raises ConfigError when answers were given to another sheet.
    """
    made, key = build_sheet(read_generations(run_dir), human)
    directory = directory_of(run_dir)
    there = read_sheet(run_dir)
    if there is not None and there[0].id == made.id:
        return there
    if there is not None and storage.list_files(storage.join(directory, "answers")):
        raise ConfigError(
            f"{directory} holds ratings of another sheet: the answers, or evaluate.human, have changed since; "
            "see its results with --results, then move or delete that directory"
        )
    storage.write_bytes(storage.join(directory, "key.json"), json.dumps(asdict(key), indent=1).encode(), private=True)
    text = json.dumps(asdict(made), ensure_ascii=False, indent=1)
    storage.write_bytes(
        storage.join(directory, "sheet.json"), text.encode(), private=True
    )  # last: with it, the sheet is there
    return made, key


def read_sheet(run_dir: str) -> tuple[Sheet, SheetKey] | None:
    """The sheet that is there. Raises ConfigError for one that is damaged."""
    directory = directory_of(run_dir)
    try:
        sheet = storage.parse_as(Sheet, storage.read_object(storage.join(directory, "sheet.json")))
        key = storage.parse_as(SheetKey, storage.read_object(storage.join(directory, "key.json")))
    except storage.MissingFile:
        return None
    except (storage.DamagedFile, ValueError):
        raise ConfigError(f"a sheet in {directory} is damaged; move that directory away, and make it anew") from None
    return (sheet, key) if key.sheet == sheet.id else None
