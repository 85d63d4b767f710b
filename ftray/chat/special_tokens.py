"""A tokenizer's control tokens, and the texts that become one, directly or after the tokenizer's normalization."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

from ftray.errors import DataError

UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")  # normalizers that leave ASCII as it is


class Normalizer:
    """The tokenizer's normalization before it looks for tokens: other characters may become those of a token."""

    def __init__(self, normalizer: Any) -> None:
        self._normalizer = normalizer
        state = json.loads(normalizer.__getstate__())
        parts = state.get("normalizers", [state]) if isinstance(state, dict) else []
        self.keeps_ascii = bool(parts) and all(part.get("type") in UNICODE_FORMS for part in parts)

    def __call__(self, text: str) -> str:
        return str(self._normalizer.normalize_str(text))


def find_normalizer(tokenizer: Any) -> Normalizer | None:
    """The tokenizer's normalizer, if it has one."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return None if normalizer is None else Normalizer(normalizer)


def forgeries(tokenizer: Any, specials: dict[str, int], normalize: Normalizer | None) -> dict[str, str]:
    """Texts that must not be part of a normalized text, each with the special token that it would become."""
    forged = {token: token for token in specials}
    if normalize is not None:
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        forged |= {normalize(str(t.content)): str(t.content) for t in added.values() if t.special and t.normalized}
    return {written: token for written, token in forged.items() if written}


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """All control tokens (text → id): named ones and added ones that the tokenizer marks special."""
    added = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = {str(t): int(tokenizer.convert_tokens_to_ids(t)) for t in tokenizer.all_special_tokens}
    return {token: i for token, i in {**added, **named}.items() if token}


class TextChecker:
    """Refuses texts whose ids would not be the text: special tokens, half characters, characters without a token.

    Args:
        tokenizer: A fast tokenizer of transformers.
        specials: Its control tokens (text → id).
        can_write: Whether a character's ids decode to it again.
    """

    def __init__(self, tokenizer: Any, specials: dict[str, int], can_write: Callable[[str], bool]) -> None:
        self._specials, self._can_write = specials, can_write
        self._special_starts = sorted({token[0] for token in specials})
        self._normalize = find_normalizer(tokenizer)
        self._keeps_ascii = self._normalize is None or self._normalize.keeps_ascii
        self._forgeries = forgeries(tokenizer, specials, self._normalize)

    def normalized(self, text: str) -> str:
        """The text as its ids decode, if the tokenizer composes or decomposes characters."""
        return self._normalize(text) if self._normalize is not None and self._keeps_ascii else text

    def is_plain(self, text: str) -> bool:
        """A quick test that `check` would accept the text."""
        return self._keeps_ascii and text.isascii() and not any(start in text for start in self._special_starts)

    def check(self, text: str, where: str) -> None:
        """Raises DataError for half of a surrogate pair or a special token. where: names the text in messages."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where} contains half of a surrogate pair, which is not a character; remove it") from None
        # Inside a text this string would become the control token, which would allow users to forge turns.
        for token in self._specials:
            if token in text:
                raise DataError(f"{where} contains the special token {token}; remove it from the text")
        if self._normalize is None:
            return
        normalized = self._normalize(text)
        for written, token in self._forgeries.items():
            if written in normalized:
                raise DataError(
                    f"{where} contains the special token {token} once the tokenizer has normalized it; remove it from the text"
                )

    def check_writable(self, text: str, where: str) -> None:
        """Raises DataError for a control character without a token. where: names the text in messages."""
        if self._unwritable is not None and (match := self._unwritable.search(text)):
            raise DataError(
                f"{where} contains the control character U+{ord(match[0]):04X}, which the tokenizer has no token for, so "
                "it would be lost; remove it"
            )

    @cached_property
    def _unwritable(self) -> re.Pattern[str] | None:
        """Control characters that the vocabulary lacks: their ids would be missing silently."""
        lost = [c for c in map(chr, range(32)) if not self._can_write(c)]
        return re.compile("[" + "".join(map(re.escape, lost)) + "]") if lost else None
