"""Control tokens of a tokenizer, and which texts become them: written out, or once the tokenizer has normalized them."""

from __future__ import annotations

import json
from typing import Any

UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")  # normalizers that leave ASCII as it is


class Normalizer:
    """What a tokenizer does to a text before it looks for tokens: other characters may become those of a token."""

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
    """What must not be in a normalized text, and the special token that it would become."""
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
