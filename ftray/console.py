"""Output for the user: messages, tables and progress, on a terminal, in a log, or as JSON lines.

Passwords and keys are removed from every line. On a terminal, progress and tables are drawn with rich; elsewhere they are
plain text. `quiet_natives` redirects the output of libraries and Ray's processes to a file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

from ftray.redact import redacted, redacted_tree

PLAIN_EVERY_S = 10.0  # seconds between progress lines without a terminal


class Console:
    """The user's output stream.

    Attributes:
        run: Name of the run, a field of JSON lines.
        step: The step, a field of JSON lines.

    Args:
        stream: Default: stdout.
        as_json: Print each line as a JSON object, for log collectors.
    """

    def __init__(self, stream: IO[str] | None = None, as_json: bool = False) -> None:
        self._stream, self._as_json = outlive_terminal(stream or sys.stdout), as_json
        self._bar: ProgressLine | LiveLines | None = None
        self.run: str | None = None
        self.step: int | None = None

    @property
    def as_json(self) -> bool:
        """Whether each line is a JSON object."""
        return self._as_json

    @property
    def is_terminal(self) -> bool:
        """Whether the output is a terminal."""
        return self._stream.isatty() and not self._as_json

    def say(self, text: str = "", *, styled: bool = False) -> None:
        """Prints a line without control sequences. styled: keep the escape sequences, which are ftray's own."""
        if self._as_json:
            if text.strip():
                self.event("message", text)
            return
        line = redacted(text) if styled else printable(redacted(text))
        if self._bar is None or not self._bar.print_above(line):
            print(line, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        if self._as_json:
            self.event("message", text, "warning")
        else:
            self.say(f"warning: {text}")

    def event(self, event: str, message: str = "", level: str = "info", rank: int | None = None, **fields: Any) -> None:
        """Prints a JSON line in JSON mode, otherwise nothing. rank: the event's worker, or None for the command itself."""
        if self._as_json:
            line = json_line(event, message, level, self.run, rank, self.step, **fields)
            print(line, file=self._stream, flush=True)

    def table(self, rows: Sequence[Sequence[str]], *, has_head: bool = True) -> None:
        """Prints rows in columns. has_head: the first row is the heading."""
        if not rows:
            return
        if self.is_terminal and self._bar is None:
            clean = [[printable(redacted(cell)) for cell in row] for row in rows]
            print(_rich_table(clean, has_head), file=self._stream, end="", flush=True)
            return
        for line in aligned(rows):
            self.say(line)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[ProgressLine]:
        """Shows progress over `total` units, of which `done` are already done."""
        self._bar = bar = ProgressLine(self._stream, what, total, done, self.event if self._as_json else None)
        try:
            yield bar
        finally:
            bar.close()
            self._bar = None

    @contextmanager
    def live_lines(self) -> Iterator[LiveLines]:
        """Shows lines that are updated in place, on a terminal only."""
        self._bar = lines = LiveLines(self._stream, self.is_terminal)
        try:
            yield lines
        finally:
            lines.close()
            self._bar = None

    @contextmanager
    def quiet_natives(self, log: Path) -> Iterator[None]:
        """Redirects file descriptors 1 and 2 to `log`; this console keeps its stream."""
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


class _LiveRegion:
    """Lines at the bottom of a terminal, drawn with rich. Redraws only on update, and keeps the cursor visible."""

    def __init__(self, stream: IO[str], is_transient: bool) -> None:
        from rich.console import Console as Terminal
        from rich.live import Live

        terminal = Terminal(file=cast(Any, stream), force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=terminal,
            auto_refresh=False,
            transient=is_transient,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()
        terminal.show_cursor(True)  # a killed process could not restore it

    def show(self, renderable: Any) -> None:
        """Replaces the lines."""
        self._live.update(renderable, refresh=True)

    def print_above(self, line: str) -> None:
        """Prints a line above the region."""
        from rich.text import Text

        self._live.console.print(Text.from_ansi(line), soft_wrap=True)

    def stop(self) -> None:
        """Ends the region; a transient one disappears."""
        self._live.stop()


class ProgressLine:
    """Progress with the remaining time: a bar on a terminal, otherwise a line every PLAIN_EVERY_S seconds."""

    def __init__(
        self, stream: IO[str], what: str, total: int, done: int, event: Callable[[str, str], None] | None = None
    ) -> None:
        self._stream, self._what, self._total, self._event = stream, what, total, event
        self._first, self._done, self._began_s = done, done, 0.0
        self._shown_s, self._fields, self._is_terminal = 0.0, "", stream.isatty() and event is None
        self._region: _LiveRegion | None = None

    def update(self, done: int, fields: str = "") -> None:
        """Shows that `done` units are done. fields: more text, such as the loss."""
        now = time.monotonic()
        if not self._began_s:  # the time before the first unit (starting workers, loading) is not part of the rate
            self._first, self._began_s = done, now
        self._done, self._fields = done, fields
        if self._is_terminal:
            self._region = self._region or _LiveRegion(self._stream, is_transient=False)
            self._region.show(_rich_progress(redacted(self._text()), done, self._total))
        elif now - self._shown_s >= PLAIN_EVERY_S or done >= self._total:
            self._shown_s = now
            if self._event is not None:
                self._event("progress", self._text())
                return
            print(printable(redacted(self._text())), file=self._stream, flush=True)

    def print_above(self, line: str) -> bool:
        """Prints a line above the bar, if there is one; returns whether it did."""
        if self._region is not None:
            self._region.print_above(line)
        return self._region is not None

    def close(self) -> None:
        """Leaves the last state as a line."""
        if self._region is not None:
            self._region.stop()
            self._region = None

    def _text(self) -> str:
        made, seconds = self._done - self._first, time.monotonic() - self._began_s
        left = ""
        if made and self._done < self._total:
            left = f" · {duration(seconds / made * (self._total - self._done))} left"
        fields = f" · {printable(self._fields)}" if self._fields else ""
        return f"{printable(self._what)} {self._done}/{self._total}{fields}{left}"


def _rich_progress(text: str, done: int, total: int) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(Text(text), ProgressBar(total=max(1, total), completed=done, width=20))
    return grid


def _rich_table(rows: Sequence[Sequence[str]], has_head: bool) -> str:
    from rich import box
    from rich.console import Console as Terminal
    from rich.table import Table
    from rich.text import Text

    terminal = Terminal(force_terminal=True, highlight=False, markup=False, emoji=False)
    table = Table(box=box.SIMPLE_HEAD, show_header=has_head, pad_edge=False)
    for i in range(max(map(len, rows))):
        table.add_column(Text(rows[0][i]) if has_head else "", overflow="fold")
    for row in rows[has_head:]:
        table.add_row(*map(Text, row))
    with terminal.capture() as capture:
        terminal.print(table)
    return capture.get()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of text with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class LiveLines:
    """Lines below all others that are updated in place on a terminal, as far as they fit."""

    def __init__(self, stream: IO[str], is_terminal: bool) -> None:
        self._stream, self._is_terminal, self._shown = stream, is_terminal, list[str]()
        self._region: _LiveRegion | None = None

    def update(self, lines: list[str]) -> None:
        """Replaces the lines."""
        if not self._is_terminal or lines == self._shown:
            return
        from rich.text import Text

        self._shown = list(lines)
        self._region = self._region or _LiveRegion(self._stream, is_transient=True)
        clean = (printable(line).replace("\n", " ") for line in lines)
        self._region.show(Text("\n".join(clean), no_wrap=True, overflow="ellipsis"))

    def print_above(self, line: str) -> bool:
        """Prints a line above the others, if there are any; returns whether it did."""
        if self._region is not None:
            self._region.print_above(line)
        return self._region is not None

    def close(self) -> None:
        """Removes the lines."""
        if self._region is not None:
            self._region.stop()
            self._region = None


class _DetachableStream:
    """A text stream that discards output once its terminal is closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As for any stream."""
        try:
            return self._stream.write(text)
        except OSError as err:
            self._drop(err)
            return len(text)

    def flush(self) -> None:
        """As for any stream."""
        try:
            self._stream.flush()
        except OSError as err:
            self._drop(err)

    def _drop(self, err: OSError) -> None:
        """Discards all further output. A closed pipe raises, because the caller handles it."""
        if err.errno != errno.EIO:
            raise err
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, self._stream.fileno())
        os.close(target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_terminal(stream: IO[str]) -> IO[str]:
    """Wraps a stream so that writes do not fail when its terminal is closed: the run still has to commit a checkpoint."""
    return stream if isinstance(stream, _DetachableStream) else cast(IO[str], _DetachableStream(stream))


def json_line(
    event: str,
    message: str,
    level: str,
    run: str | None = None,
    rank: int | None = None,
    step: int | None = None,
    **fields: Any,
) -> str:
    """An event as one line of JSON, as described in docs/logs.md. Non-finite numbers become null."""
    time_utc = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": time_utc, "level": level, "run": run, "rank": rank, "step": step, "event": event}
    line |= {"message": message, **fields}
    return json.dumps(redacted_tree(_json_value(line)), ensure_ascii=False, allow_nan=False)


def _json_value(value: Any) -> Any:
    """A value as JSON: non-finite floats become None, unknown types text."""
    if isinstance(value, dict):
        return {str(key): _json_value(below) for key, below in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json_value(below) for below in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


# C0 except tab and line feed, DEL, C1, and characters that reorder or hide text (bidirectional controls, invisible characters)
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SEQUENCE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, the cursor
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\\\|\x9c)?"  # OSC, DCS: titles, links
    "|\x1b[ -/]*[0-~]"
)


def printable(text: str) -> str:
    """Removes terminal control from text: escape sequences are dropped, `\\r` becomes a line feed.

    For text from jobs, logs, records, models and foreign files. Half a surrogate pair becomes `?`.
    """
    text = _SEQUENCE.sub("", text.replace("\r\n", "\n"))
    text = _CONTROL.sub("", text.replace("\r", "\n"))
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def escaped(text: str) -> str:
    """Writes control characters as `\\x1b`, for errors that quote names from foreign files."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """Formats seconds: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
