"""The sheet of a human evaluation: its questions, their order, and the side of each model's answer.

It is a pure function of the answers and of evaluate.human. Raters see the sheet. The key is a separate file and records the tuned
model's side. Knows neither raters nor pages.
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
    """The part that raters see. Samples are counted from 1.

    Attributes:
        id: A hash of the sheet and its key.
        criteria: Names of the scores.
        samples: The questions in order.
    """

    id: str
    criteria: list[str]
    samples: list[SheetItem]


@dataclass(frozen=True)
class SheetKey:
    """The part that raters must not see.

    Attributes:
        sheet: The id of the sheet.
        tuned: The tuned model's side in each sample.
        slices: The slice of each sample, or "".
        token: The secret part of the page's address, which stays the same when the server restarts.
    """

    sheet: str
    tuned: list[Side]
    slices: list[str]
    token: str


def build_sheet(generations: Sequence[Generation], human: config.HumanEvalConfig) -> tuple[Sheet, SheetKey]:
    """Selects, shuffles and blinds the samples. Each slice gets its share of them, at least one if possible.

    The tuned model is on each side in half of the samples: within one for an odd number, and within two in each slice.
    """
    slices = [g.slice for g in generations]
    ranks = [hash_of(human.seed, "pick", g.question, g.reference, i) for i, g in enumerate(generations)]
    picked: list[int] = []  # slice after slice
    for name, share in _shares(slices, min(human.samples, len(slices))).items():
        picked += sorted((i for i, s in enumerate(slices) if s == name), key=lambda i: ranks[i])[:share]
    is_first = {}
    for at, i in enumerate(picked):  # a coin flip selects which of two neighbors has the tuned model on side a
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
    """The share of each slice in `number` samples: proportional, by largest remainders, at least one if possible."""
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
    """The directory of a run's sheet, key, answers and results."""
    return storage.join(run_dir, "evaluate", "human")


def open_sheet(run_dir: str, human: config.HumanEvalConfig) -> tuple[Sheet, SheetKey]:
    """Returns the sheet of these settings, and writes it if it does not exist.

    Raises:
        ConfigError: There are already ratings of another sheet.
    """
    sheet, key = build_sheet(read_generations(run_dir), human)
    directory = directory_of(run_dir)
    existing = read_sheet(run_dir)
    if existing is not None and existing[0].id == sheet.id:
        return existing
    if existing is not None and storage.list_files(storage.join(directory, "answers")):
        raise ConfigError(
            f"{directory} holds ratings of another sheet: the answers, or evaluate.human, have changed since; "
            "see its results with --results, then move or delete that directory"
        )
    storage.write_bytes(storage.join(directory, "key.json"), json.dumps(asdict(key), indent=1).encode(), private=True)
    text = json.dumps(asdict(sheet), ensure_ascii=False, indent=1)
    storage.write_bytes(
        storage.join(directory, "sheet.json"), text.encode(), private=True
    )  # last, because it completes the sheet
    return sheet, key


def read_sheet(run_dir: str) -> tuple[Sheet, SheetKey] | None:
    """The existing sheet and its key, or None. Raises ConfigError if they are damaged."""
    directory = directory_of(run_dir)
    try:
        sheet = storage.parse_as(Sheet, storage.read_object(storage.join(directory, "sheet.json")))
        key = storage.parse_as(SheetKey, storage.read_object(storage.join(directory, "key.json")))
    except storage.MissingFile:
        return None
    except (storage.DamagedFile, ValueError):
        raise ConfigError(
            f"a sheet in {directory} is damaged; move that directory away, and run the command again"
        ) from None
    return (sheet, key) if key.sheet == sheet.id else None
