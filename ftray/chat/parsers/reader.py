"""Reads a text that arrives in pieces. Parsers of answers are written as coroutines over it.

A coroutine yields whenever it needs more text, and goes on once `TextReader.feed` has added some. A parser is thus written as if
the text were complete, and still passes each piece on as soon as its meaning is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
Emit = Callable[[str], None]
BLANKS = " \t\r\n"


class TextReader:
    """The unread part of a text.

    Attributes:
        is_complete: Whether no more text will come.
        stripped: The blanks before the last marker of `until`, if it left them out.
    """

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self._record: list[str] | None = None
        self.is_complete, self.stripped = False, ""

    def feed(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    @property
    def _rest(self) -> str:
        return self._text[self._at :] if self._at else self._text

    def _take(self, length: int) -> str:
        text = self._text[self._at : self._at + length]
        self._at += length
        if self._record is not None and text:
            self._record.append(text)
        return text

    def record(self, text: str) -> None:
        """Starts to record what is read, beginning with `text`, which has been read already."""
        self._record = [text]

    def recorded(self) -> str:
        """Ends the recording and returns it."""
        text, self._record = "".join(self._record or ()), None
        return text

    def until(self, markers: Sequence[str], emit: Emit, *, strips: bool = False) -> Reading[str | None]:
        """Passes text on up to the next marker, and reads the marker.

        Args:
            markers: Where to stop. Text that may begin one is held back.
            emit: Receives the text.
            strips: Whether blanks before a marker are left out.

        Returns:
            The marker, or None at the end of the text.
        """
        while True:
            rest = self._rest
            hits = [(rest.find(marker), -len(marker), marker) for marker in markers if marker in rest]
            if hits:
                at, _, marker = min(hits)
                text = self._take(at)
                kept = text.rstrip(BLANKS) if strips else text
                self.stripped = text[len(kept) :]
                self._pass(kept, emit)
                self._take(len(marker))
                return marker
            if self.is_complete:
                self._pass(self._take(len(rest)), emit)
                return None
            head = rest[: len(rest) - max((_overlap(rest, marker) for marker in markers), default=0)]
            self._pass(self._take(len(head.rstrip(BLANKS) if strips else head)), emit)
            yield

    def take(self, literal: str) -> Reading[bool]:
        """Reads a literal text. False, with nothing read, if another text follows."""
        while True:
            rest = self._rest
            if rest.startswith(literal):
                self._take(len(literal))
                return True
            if self.is_complete or not literal.startswith(rest):
                return False
            yield

    def blanks(self) -> Reading[None]:
        """Reads blanks."""
        while True:
            rest = self._rest
            self._take(len(rest) - len(rest.lstrip(BLANKS)))
            if self._at < len(self._text) or self.is_complete:
                return
            yield

    def peek(self) -> Reading[str]:
        """The next character, which stays unread; "" at the end."""
        while self._at >= len(self._text):
            if self.is_complete:
                return ""
            yield
        return self._text[self._at]

    def json_value(self, emit: Emit) -> Reading[bool]:
        """Passes on the text of a JSON object, list or string. False if there is none, or it is cut off.

        Only its end is looked for: what is inside may be invalid.
        """
        first = yield from self.peek()
        if not first or first not in '{["':
            return False
        depth, in_string, is_escaped = 0, False, False
        while True:
            rest = self._rest
            for i, character in enumerate(rest):
                if in_string:
                    in_string = is_escaped or character != '"'
                    is_escaped = not is_escaped and character == "\\"
                elif character == '"':
                    in_string = True
                else:
                    depth += (character in "{[") - (character in "}]")
                if depth == 0 and not in_string:
                    self._pass(self._take(i + 1), emit)
                    return True
            self._pass(self._take(len(rest)), emit)
            if self.is_complete:
                return False
            yield

    def json_string(self) -> Reading[str | None]:
        """Reads a JSON string. None if there is none, or it is invalid."""
        parts: list[str] = []
        if (yield from self.peek()) != '"' or not (yield from self.json_value(parts.append)):
            return None
        try:
            return str(json.loads("".join(parts), strict=False))
        except ValueError:
            return None

    @staticmethod
    def _pass(text: str, emit: Emit) -> None:
        if text:
            emit(text)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` without being all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
