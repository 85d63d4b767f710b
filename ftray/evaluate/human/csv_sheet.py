"""The sheet as CSV, out and in, for those who would rather fill in a spreadsheet.

Knows the sheet, and answers as it reads them; not whose side is whose.
"""

from __future__ import annotations

import csv
import io
import unicodedata

from ftray.errors import ConfigError
from ftray.evaluate.human.answers import Rating, check_name
from ftray.evaluate.human.sheet import Sheet

SIDES = ("a", "b")
_FORMULA = frozenset("=+-@\t\r\n|%")  # a spreadsheet may compute what begins so, or after blanks
_PREFERRED = {"a": "a", "b": "b", "same": "same", "tie": "same", "=": "same"}


def _score_columns(sheet: Sheet) -> dict[str, tuple[str, str]]:
    """Columns of scores: name → (side, criterion)."""
    return {f"{side.upper()} {name}": (side, name) for name in sheet.criteria for side in SIDES}


def to_csv(sheet: Sheet) -> bytes:
    """The blinded sheet to be filled in, a row for each sample; in UTF-8 with the mark by which spreadsheets know it."""
    out = io.StringIO()
    writer = csv.writer(out)
    scores = _score_columns(sheet)
    writer.writerow(["sheet", "sample", "question", "reference", "answer A", "answer B", "rater", "preferred", *scores])
    for number, s in enumerate(sheet.samples, 1):
        texts = [_as_text(t) for t in (s.question, s.reference, s.a, s.b)]
        writer.writerow([sheet.id, number, *texts, *[""] * (2 + len(scores))])
    return out.getvalue().encode("utf-8-sig")


def _as_text(text: str) -> str:
    """A cell that no spreadsheet takes for a formula.

    Blanks and invisible characters before a sign are looked through, and wide forms (＝ ＋ － ＠) taken for their plain ones.
    """
    first = next((c for c in text if not (c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Zs"))), "")
    plain = unicodedata.normalize("NFKC", first)[:1]
    return f"'{text}" if text[:1] in _FORMULA or plain in _FORMULA or plain == "\u2212" else text


def from_csv(data: bytes, sheet: Sheet, origin: str) -> dict[str, dict[int, Rating]]:
    """Answers by rater and sample out of filled rows. `rater` may be given in the first row alone; it holds downwards.

    Columns may be in any order, split by comma, semicolon or tab; rows without an answer are passed over. Raises
    ConfigError naming the line, the value and the remedy.
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
    found: dict[str, dict[int, Rating]] = {}
    rater = ""
    for row in reader:
        where, rater = f"{origin}, row {reader.line_num}", (row["rater"] or "").strip() or rater
        answer = _answer(row, scores, where)
        if answer == Rating():
            continue
        number = _number(row, sheet, where)
        if not rater:
            raise ConfigError(f"{where}: nobody's name is in the column 'rater'; write it into the first row")
        check_name(rater)
        if number in found.setdefault(rater, {}):
            raise ConfigError(f"{where}: {rater} has answered sample {number} in an earlier row; remove one")
        found[rater][number] = answer
    if not found:
        raise ConfigError(f"{origin} has no filled row; write A, B or same into the column 'preferred'")
    return found


def _number(row: dict[str, str], sheet: Sheet, where: str) -> int:
    if (row["sheet"] or "").strip() != sheet.id:
        raise ConfigError(
            f"{where}: is of sheet '{row['sheet']}', and this run's is {sheet.id}; fill in that one (--csv)"
        )
    text = (row["sample"] or "").strip()
    if not text.isdecimal() or not 1 <= int(text) <= len(sheet.samples):
        raise ConfigError(f"{where}: sample '{text}' is not on the sheet; it has samples 1 to {len(sheet.samples)}")
    return int(text)


def _answer(row: dict[str, str], scores: dict[str, tuple[str, str]], where: str) -> Rating:
    said = (row["preferred"] or "").strip()
    if said and said.lower() not in _PREFERRED:
        raise ConfigError(f"{where}: preferred is '{said}'; write A, B or same")
    sides: dict[str, dict[str, int]] = {"a": {}, "b": {}}
    for column, (side, name) in scores.items():
        if text := (row[column] or "").strip():
            if text not in {"1", "2", "3", "4", "5"}:
                raise ConfigError(f"{where}: {column} is '{text}'; write a whole number from 1 to 5")
            sides[side][name] = int(text)
    return Rating.model_validate({"preferred": _PREFERRED.get(said.lower()), **sides})
