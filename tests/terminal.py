"""A terminal for tests: a stream that says it is one, and the screen that its text leaves."""

from __future__ import annotations

import io
import re


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """The lines on the screen after this text. Knows line feeds, returns, cursor up, erase line; ignores colors."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-?]*[@-~]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b[") and part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part.endswith("K") and part.startswith("\x1b["):
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    shown = [line.rstrip() for line in lines]
    return shown[: len(shown) - next((n for n, line in enumerate(reversed(shown)) if line), len(shown))]
