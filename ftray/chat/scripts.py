"""Counts the Unicode scripts of a text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

_NO_LETTERS = bytes(n for n in range(256) if not (n < 128 and chr(n).isalpha()))


def count_scripts(text: str, into: Counter[str]) -> None:
    """Counts letters by Unicode script (the first word of their name: LATIN, CYRILLIC, CJK, …)."""
    plain = len(text.encode("ascii", "ignore").translate(None, delete=_NO_LETTERS))
    if plain:
        into["LATIN"] += plain
    if not text.isascii():
        for letter, number in Counter(c for c in text if c > "\x7f" and c.isalpha()).items():
            into[_script(letter)] += number


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0]
