"""Encodes texts that spell special tokens as plain text: "<|im_end|>" from a client is ten characters, not the end of a turn.

The template renders a character in place of each spelling, so it cannot mistake one for a token either. The spellings return
when the text is tokenized.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ftray.chat.messages import Conversation
from ftray.errors import DataError

FIRST, LAST = "\U000f0000", "\U000ffffd"  # a private use area of Unicode


class SpelledTokens:
    """Hides spellings of special tokens in a conversation's texts.

    Args:
        tokenizer: A fast tokenizer of transformers.
        specials: Its control tokens (text → id).
    """

    def __init__(self, tokenizer: Any, specials: Mapping[str, int]) -> None:
        tokens = sorted(specials, key=len, reverse=True)[: ord(LAST) - ord(FIRST)]
        self._characters = {token: chr(ord(FIRST) + i) for i, token in enumerate(tokens)}
        self._tokens = {character: token for token, character in self._characters.items()}
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._hidden = re.compile(f"([{FIRST}-{LAST}])")
        self._tokenizer, self._special_ids = tokenizer, frozenset(specials.values())
        self._backend: Any = None

    def hide(self, conversation: Conversation) -> Conversation:
        """The conversation with a character in place of each spelling. Unchanged if a text has such characters itself."""
        texts = [text for m in conversation.messages for text in (m.content, m.reasoning)]
        if any(self._hidden.search(text) for text in texts) or not any(map(self._pattern.search, texts)):
            return conversation
        messages = [
            replace(m, content=self._hide(m.content), reasoning=self._hide(m.reasoning)) for m in conversation.messages
        ]
        return replace(conversation, messages=tuple(messages))

    def check_shown(self, conversation: Conversation, text: str) -> None:
        """Raises DataError if a rendered text lacks a hidden spelling of the contents."""
        for character in {c for m in conversation.messages for c in self._hidden.findall(m.content)}:
            if text.count(character) < sum(m.content.count(character) for m in conversation.messages):
                raise DataError(
                    f"a turn contains the special token {self._tokens.get(character, '')}, and the chat template changes it; "
                    "remove it from the text"
                )

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The parts of a rendered text, and whether each is a spelling."""
        for part in self._hidden.split(text):
            if part:
                yield self._tokens.get(part, part), part in self._tokens

    def encode(self, spelling: str, anchor: str = "") -> list[int]:
        """The ids of a spelling as plain text. anchor: a text that it continues."""
        if self._backend is None:
            self._backend = copy.deepcopy(self._tokenizer.backend_tokenizer)
            self._backend.encode_special_tokens = True
        head, whole = self._plain(anchor) if anchor else [], self._plain(anchor + spelling)
        ids = whole[len(head) :]
        if whole[: len(head)] != head or self._special_ids.intersection(ids):
            raise DataError(f"a turn contains the special token {spelling}; remove it from the text")
        return ids

    def _plain(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _hide(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._characters[match[0]], text)
