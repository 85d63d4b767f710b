"""The ratings: one file per rater, rewritten with every answer, and CSV sheets.

Knows samples by number and sides by letter, but neither the page nor the key.
"""

from __future__ import annotations

import csv
import io
import json
import threading
import unicodedata
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftray import storage
from ftray.data.order import key as hash_of
from ftray.errors import ConfigError
from ftray.evaluate.human.sheet import Sheet

SIDES = ("a", "b")
_FORMULA = frozenset("=+-@\t\r\n|%")  # a spreadsheet may run a cell that starts with one of these, also after blanks
_PREFERRED = {"a": "a", "b": "b", "same": "same", "tie": "same", "=": "same"}


def _score_columns(sheet: Sheet) -> dict[str, tuple[str, str]]:
    """Columns of scores: name → (side, criterion)."""
    return {f"{side.upper()} {name}": (side, name) for name in sheet.criteria for side in SIDES}


def to_csv(sheet: Sheet) -> bytes:
    """The blinded sheet as CSV with one row per sample; UTF-8 with a byte order mark, for spreadsheets."""
    out = io.StringIO()
    writer = csv.writer(out)
    scores = _score_columns(sheet)
    writer.writerow(["sheet", "sample", "question", "reference", "answer A", "answer B", "rater", "preferred", *scores])
    for number, s in enumerate(sheet.samples, 1):
        texts = [_as_text(t) for t in (s.question, s.reference, s.a, s.b)]
        writer.writerow([sheet.id, number, *texts, *[""] * (2 + len(scores))])
    return out.getvalue().encode("utf-8-sig")


def _as_text(text: str) -> str:
    """A cell that no spreadsheet runs as a formula.

    Leading blanks and invisible characters are ignored, and full-width forms (＝ ＋ － ＠) count as their plain characters.
    """
    first = next((c for c in text if not (c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Zs"))), "")
    plain = unicodedata.normalize("NFKC", first)[:1]
    return f"'{text}" if text[:1] in _FORMULA or plain in _FORMULA or plain == "\u2212" else text


def from_csv(data: bytes, sheet: Sheet, origin: str) -> dict[str, dict[int, Rating]]:
    """Reads a filled CSV sheet.

    An empty `rater` repeats the name of the row above. Columns may be in any order, separated by comma, semicolon or tab. Rows
    without an answer are skipped.

    Returns:
        Answers by rater and sample.

    Raises:
        ConfigError: A value is invalid. The message names the row and the remedy.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")  # as spreadsheets on Windows save a plain CSV
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    scores = _score_columns(sheet)
    if missing := {"sheet", "sample", "rater", "preferred", *scores} - set(reader.fieldnames or ()):
        raise ConfigError(f"{origin} lacks the column '{min(missing)}'; fill in the file that --csv writes")
    answers: dict[str, dict[int, Rating]] = {}
    rater = ""
    for row in reader:
        where, rater = f"{origin}, row {reader.line_num}", (row["rater"] or "").strip() or rater
        answer = _answer(row, scores, where)
        if answer == Rating():
            continue
        number = _number(row, sheet, where)
        if not rater:
            raise ConfigError(f"{where}: the column 'rater' is empty; write your name into the first row")
        check_name(rater)
        if number in answers.setdefault(rater, {}):
            raise ConfigError(f"{where}: {rater} has answered sample {number} in an earlier row; remove one")
        answers[rater][number] = answer
    if not answers:
        raise ConfigError(f"{origin} has no filled row; write A, B or same into the column 'preferred'")
    return answers


def _number(row: dict[str, str], sheet: Sheet, where: str) -> int:
    if (row["sheet"] or "").strip() != sheet.id:
        raise ConfigError(
            f"{where}: the row belongs to sheet '{row['sheet']}', but this run's sheet is {sheet.id}; fill in that one (--csv)"
        )
    text = (row["sample"] or "").strip()
    if not text.isdecimal() or not 1 <= int(text) <= len(sheet.samples):
        raise ConfigError(f"{where}: sample '{text}' is not on the sheet; it has samples 1 to {len(sheet.samples)}")
    return int(text)


def _answer(row: dict[str, str], scores: dict[str, tuple[str, str]], where: str) -> Rating:
    preferred = (row["preferred"] or "").strip()
    if preferred and preferred.lower() not in _PREFERRED:
        raise ConfigError(f"{where}: preferred is '{preferred}'; write A, B or same")
    sides: dict[str, dict[str, int]] = {"a": {}, "b": {}}
    for column, (side, name) in scores.items():
        if text := (row[column] or "").strip():
            if text not in {"1", "2", "3", "4", "5"}:
                raise ConfigError(f"{where}: {column} is '{text}'; write an integer from 1 to 5")
            sides[side][name] = int(text)
    return Rating.model_validate({"preferred": _PREFERRED.get(preferred.lower()), **sides})


MAX_NAME_CHARS = 40
Score = Annotated[int, Field(ge=1, le=5, strict=True)]


class Rating(BaseModel):
    """One rater's answer to one sample: the preferred side, and scores of each side by criterion. All are optional."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preferred: Literal["a", "b", "same"] | None = None
    a: dict[str, Score] = {}
    b: dict[str, Score] = {}


class RatingStore:
    """All answers to one sheet, by rater and sample (from 1), in storage and in memory. Thread-safe."""

    def __init__(self, directory: str, sheet: Sheet) -> None:
        self._folder, self._sheet = storage.join(directory, "answers"), sheet
        self._lock = threading.Lock()
        self.by_rater: dict[str, dict[int, Rating]] = {}
        for info in storage.list_files(self._folder, ".json"):
            try:
                tree = storage.read_object(info.uri)
                answers = {int(n): Rating.model_validate(answer) for n, answer in tree["answers"].items()}
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
            self.by_rater[rater] = answers

    def of(self, rater: str) -> dict[int, Rating]:
        """A rater's answers so far."""
        with self._lock:
            return dict(self.by_rater.get(rater, {}))

    def save(self, rater: str, answers: dict[int, Rating]) -> None:
        """Stores answers. They replace the rater's earlier answers to the same samples.

        Raises:
            ConfigError: The name is invalid, or the sheet lacks the sample or criterion.
        """
        check_name(rater)
        for number, answer in answers.items():
            if not 1 <= number <= len(self._sheet.samples):
                raise ConfigError(
                    f"sample {number} is not on the sheet; it has samples 1 to {len(self._sheet.samples)}"
                )
            if unknown := [name for name in (*answer.a, *answer.b) if name not in self._sheet.criteria]:
                raise ConfigError(
                    f"'{unknown[0]}' is not a criterion of the sheet; its criteria: {', '.join(self._sheet.criteria)}"
                )
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
    """Raises ConfigError for a name that is empty, too long, or longer than one line."""
    if not rater.strip() or rater != rater.strip() or len(rater) > MAX_NAME_CHARS or not rater.isprintable():
        raise ConfigError(
            f"{rater[:60]!r} is not a valid name for a rater; use 1 to {MAX_NAME_CHARS} characters on one line"
        )


def parse_answer(text: str | bytes) -> Rating:
    """Parses an answer from JSON. Raises ConfigError."""
    try:
        return Rating.model_validate_json(text)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"invalid answer: {where}: {first['msg']}") from None
