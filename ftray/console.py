"""What the user sees: lines, warnings and progress on a terminal, in a log, or as a JSON object a line. Knows nothing of runs.

Nothing passes here with a password or key in it.

`quiet_natives` sends everything that libraries print (Ray's processes too) to a file, and keeps the user's own stream.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

from ftray.redact import redacted, redacted_tree

PLAIN_EVERY_S = 10.0  # seconds between progress lines where there is no terminal


class Console:
    """The user's stream. as_json: each line is a JSON object, for programs that gather logs.

    run, step: what lines of JSON tell beside their text, as far as it is known.
    """

    def __init__(self, stream: IO[str] | None = None, as_json: bool = False) -> None:
        self._stream, self._as_json = outlive_terminal(stream or sys.stdout), as_json
        self._bar: ProgressLine | LiveTable | None = None
        self.run: str | None = None
        self.step: int | None = None

    @property
    def as_json(self) -> bool:
        """Whether each line is a JSON object."""
        return self._as_json

    @property
    def is_terminal(self) -> bool:
        """Whether a person is watching."""
        return self._stream.isatty() and not self._as_json

    def say(self, text: str = "", *, styled: bool = False) -> None:
        """Prints a line, without what a terminal would act on. styled: the escape sequences in it are ftray's own."""
        if self._as_json:
            if text.strip():
                self.event("message", text)
            return
        if self._bar is not None:
            self._bar.clear()
        shown = redacted(text)
        print(shown if styled else printable(shown), file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        if self._as_json:
            self.event("message", text, "warning")
        else:
            self.say(f"warning: {text}")

    def event(self, event: str, message: str = "", level: str = "info", rank: int | None = None, **what: Any) -> None:
        """A line of JSON, where lines are such; else nothing. rank: whose event it is; None: the command's own."""
        if self._as_json:
            line = json_line(event, message, level, self.run, rank, self.step, **what)
            print(line, file=self._stream, flush=True)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[ProgressLine]:
        """A progress display over `total` units, `done` of them done before."""
        self._bar = bar = ProgressLine(self._stream, what, total, done, self.event if self._as_json else None)
        try:
            yield bar
        finally:
            bar.close()
            self._bar = None

    @contextmanager
    def table(self) -> Iterator[LiveTable]:
        """Lines that are rewritten in place below all others; nothing in a log."""
        self._bar = table = LiveTable(self._stream, self.is_terminal)
        try:
            yield table
        finally:
            table.clear()
            self._bar = None

    @contextmanager
    def quiet_natives(self, log: Path) -> Iterator[None]:
        """File descriptors 1 and 2 go to `log`; this console keeps its stream."""
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        own = self._stream
        own_copy = os.fdopen(os.dup(own.fileno()), "w", buffering=1, encoding="utf-8", errors="replace")
        self._stream = outlive_terminal(own_copy)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, copy in enumerate(kept, start=1):
                os.dup2(copy, fd)
                os.close(copy)
            self._stream.close()
            self._stream = own


class ProgressLine:
    """Done and total, with rate-based time left: one line that is rewritten on a terminal, a line now and then else."""

    def __init__(
        self, stream: IO[str], what: str, total: int, done: int, event: Callable[[str, str], None] | None = None
    ) -> None:
        self._stream, self._what, self._total, self._event = stream, what, total, event
        self._first, self._done, self._began_s = done, done, 0.0
        self._shown_s, self._fields, self._is_terminal = 0.0, "", stream.isatty() and event is None

    def update(self, done: int, fields: str = "") -> None:
        """Shows that `done` units are done; fields: what else to show, e.g. the loss."""
        now = time.monotonic()
        if not self._began_s:  # what comes before the first unit (starting workers, loading) says nothing of the rate
            self._first, self._began_s = done, now
        self._done, self._fields = done, fields
        if self._is_terminal:
            self._stream.write(f"\r\x1b[2K{self._text()}")
            self._stream.flush()
        elif now - self._shown_s >= PLAIN_EVERY_S or done >= self._total:
            self._shown_s = now
            if self._event is not None:
                self._event("progress", self._text())
                return
            print(printable(redacted(self._text())), file=self._stream, flush=True)

    def clear(self) -> None:
        """Makes room for a line."""
        if self._is_terminal:
            self._stream.write("\r\x1b[2K")

    def close(self) -> None:
        """Leaves the last state as a line."""
        if self._is_terminal and self._began_s:
            self._stream.write(f"\r\x1b[2K{self._text()}\n")
            self._stream.flush()

    def _text(self) -> str:
        made, seconds = self._done - self._first, time.monotonic() - self._began_s
        left = ""
        if made and self._done < self._total:
            left = f" · {duration(seconds / made * (self._total - self._done))} left"
        fields = f" · {printable(self._fields)}" if self._fields else ""
        return f"{printable(self._what)} {self._done}/{self._total}{fields}{left}"


class LiveTable:
    """Lines below all others that are rewritten on a terminal, as many and as long as fit on it."""

    def __init__(self, stream: IO[str], is_terminal: bool) -> None:
        self._stream, self._is_terminal, self._shown = stream, is_terminal, list[str]()

    def update(self, lines: list[str]) -> None:
        """Shows these lines in place of those before."""
        if not self._is_terminal:
            return
        width, height = shutil.get_terminal_size()
        lines = [printable(line).replace("\n", " ")[: width - 1] for line in lines[: height - 1]]
        if lines != self._shown:
            self.clear()
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()
            self._shown = lines

    def clear(self) -> None:
        """Makes room for a line."""
        if self._is_terminal and self._shown:
            self._stream.write(f"\x1b[{len(self._shown)}F\x1b[J")
            self._shown = []


class _Outliving:
    """A text stream that goes on without a reader once its terminal was closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of any stream."""
        try:
            return self._stream.write(text)
        except OSError as err:
            self._drop(err)
            return len(text)

    def flush(self) -> None:
        """As of any stream."""
        try:
            self._stream.flush()
        except OSError as err:
            self._drop(err)

    def _drop(self, err: OSError) -> None:
        """Sends what is left, and all that follows, nowhere. A pipe that nobody reads is the caller's business."""
        if err.errno != errno.EIO:
            raise err
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, self._stream.fileno())
        os.close(target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_terminal(stream: IO[str]) -> IO[str]:
    """The stream, whose writes don't fail when its terminal is closed: a run that stops for that still has to commit."""
    return stream if isinstance(stream, _Outliving) else cast(IO[str], _Outliving(stream))


def json_line(
    event: str,
    message: str,
    level: str,
    run: str | None = None,
    rank: int | None = None,
    step: int | None = None,
    **what: Any,
) -> str:
    """An event as one line of JSON; docs/logs.md describes it. What is not finite becomes null."""
    time_utc = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": time_utc, "level": level, "run": run, "rank": rank, "step": step, "event": event}
    line |= {"message": message, **what}
    return json.dumps(redacted_tree(_plain(line)), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """What JSON can say, floats that it can't as None, all else as text."""
    if isinstance(value, dict):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(below) for below in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


# C0 but tab and line feed, DEL, C1, and what reorders or hides text on a line (bidirectional controls, invisible characters)
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SEQUENCE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, the cursor
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\\\|\x9c)?"  # OSC, DCS: titles, links
    "|\x1b[ -/]*[0-~]"
)


def printable(text: str) -> str:
    """A text without what a terminal would act on: escape sequences go, a progress bar's `\\r` becomes a line feed.

    For text from jobs, logs, records, models and other people's files. Half a surrogate pair becomes `?`.
    """
    text = _SEQUENCE.sub("", text.replace("\r\n", "\n"))
    text = _CONTROL.sub("", text.replace("\r", "\n"))
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def escaped(text: str) -> str:
    """A text with its control characters written out as `\\x1b`: for errors that quote names from someone else's file."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
