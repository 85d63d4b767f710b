"""What raters said, kept as they say it: a file for each rater, written anew with every answer.

Knows samples by their number and sides by their letter; neither the page nor whose side is whose.
"""

from __future__ import annotations

import json
import threading
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftray import storage
from ftray.data.order import key as hash_of
from ftray.errors import ConfigError
from ftray.evaluate.human.sheet import Sheet

MAX_NAME_CHARS = 40
Score = Annotated[int, Field(ge=1, le=5, strict=True)]


class Rating(BaseModel):
    """One rater's answer to one sample: the preferred side, and scores of each side by criterion. All may be missing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preferred: Literal["a", "b", "same"] | None = None
    a: dict[str, Score] = {}
    b: dict[str, Score] = {}


class RatingStore:
    """All answers to one sheet, by rater and sample (from 1), in storage and here. Safe to use from several threads."""

    def __init__(self, directory: str, sheet: Sheet) -> None:
        self._folder, self._sheet = storage.join(directory, "answers"), sheet
        self._lock = threading.Lock()
        self.by_rater: dict[str, dict[int, Rating]] = {}
        for info in storage.list_files(self._folder, ".json"):
            try:
                tree = storage.read_object(info.uri)
                found = {int(n): Rating.model_validate(answer) for n, answer in tree["answers"].items()}
                rater = tree["rater"]
            except (
                storage.DamagedFile,
                ValueError,
                KeyError,
                AttributeError,
                TypeError,
            ):  # pydantic's errors are ValueErrors
                raise ConfigError(f"{info.uri} is damaged; restore it, or delete it with its rater's answers") from None
            if tree.get("sheet") != sheet.id:
                raise ConfigError(f"{info.uri} holds answers to another sheet; move it away")
            self.by_rater[rater] = found

    def of(self, rater: str) -> dict[int, Rating]:
        """What a rater has said so far."""
        with self._lock:
            return dict(self.by_rater.get(rater, {}))

    def save(self, rater: str, answers: dict[int, Rating]) -> None:
        """Keeps these answers, in place of the rater's earlier ones to the same samples; returns when they are stored.

        Raises ConfigError for a name, a sample or a criterion that the sheet doesn't have.
        """
        check_name(rater)
        for number, answer in answers.items():
            if not 1 <= number <= len(self._sheet.samples):
                raise ConfigError(
                    f"sample {number} is not on the sheet; it has samples 1 to {len(self._sheet.samples)}"
                )
            if unknown := [name for name in (*answer.a, *answer.b) if name not in self._sheet.criteria]:
                raise ConfigError(f"'{unknown[0]}' is no criterion of the sheet: {', '.join(self._sheet.criteria)}")
        with self._lock:
            merged = {**self.by_rater.get(rater, {}), **answers}
            tree = {
                "rater": rater,
                "sheet": self._sheet.id,
                "answers": {str(n): merged[n].model_dump(exclude_defaults=True) for n in sorted(merged)},
            }
            uri = storage.join(self._folder, f"{hash_of(rater).hex()}.json")
            storage.write_bytes(uri, json.dumps(tree, ensure_ascii=False, indent=1).encode(), private=True)
            self.by_rater[rater] = merged


def check_name(rater: str) -> None:
    """Raises ConfigError for a name that is empty, too long, or not of one line."""
    if not rater.strip() or rater != rater.strip() or len(rater) > MAX_NAME_CHARS or not rater.isprintable():
        raise ConfigError(f"a rater's name has 1 to {MAX_NAME_CHARS} characters on one line; {rater[:60]!r} doesn't")


def parse_answer(text: str | bytes) -> Rating:
    """An answer out of JSON. Raises ConfigError."""
    try:
        return Rating.model_validate_json(text)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"an answer can't be read: {where}: {first['msg']}") from None
