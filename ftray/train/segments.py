"""Metrics segments: the lines that one checkpoint committed, a file in `<run>/metrics/` with a checksum.

A damaged or missing segment never costs the run: its lines are read from `metrics.jsonl` if that still has them unchanged;
otherwise these steps are left out, with a warning that names the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ftray import storage
from ftray.storage import parse_object

NAME = re.compile(r"\d{8,}-\d{8,}\.jsonl")
NUMBERS = (
    *("loss", "eval_loss", "num_tokens", "num_trained_tokens", "learning_rate", "grad_norm", "tokens_per_s"),
    *("data_wait_s", "unix_s", "peak_memory_gib", "loss_scale"),
)


def segment_sum(text: str) -> str:
    """Checksum of a segment's text: sixteen hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_line(text: str) -> dict[str, Any]:
    """A line of metrics. Raises ValueError for a line that training did not write."""
    line = parse_object(text)
    step = line.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError("a line has no step")
    for key in NUMBERS:
        value = line.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key} of step {step} is not a number")
    if "loss" in line and line.get("num_tokens") is None:
        raise ValueError(f"the line of step {step} lacks num_tokens")
    return line


class SegmentReader:
    """Reads the segments of a run.

    Args:
        run_dir: The run's directory.
        sums: Known checksums by segment name.
        warn: Gets a message about each damaged segment.
    """

    def __init__(self, run_dir: str, sums: Mapping[str, str], warn: Callable[[str], None]) -> None:
        self._run_dir, self._sums, self._warn = run_dir, sums, warn
        self._merged: dict[int, str] | None = None

    def lines(self, name: str) -> dict[int, str]:
        """The text of each line by step; {} for a lost segment."""
        uri = storage.join(self._run_dir, "metrics", name)
        try:
            return self._checked(name, storage.read_bytes(uri))
        except storage.MissingFile:
            reason = "it is missing"
        except ValueError as err:
            reason = str(err)
        first, last = (int(part) for part in name.removesuffix(".jsonl").split("-"))
        if (lines := self._from_merged(name, first, last)) is not None:
            self._warn(f"{uri} is damaged ({reason}); its lines are read from metrics.jsonl")
            return lines
        self._warn(
            f"{uri} is damaged ({reason}); the metrics of steps {first} to {last} are left out. "
            "Checkpoints do not depend on them"
        )
        return {}

    def _checked(self, name: str, data: bytes) -> dict[int, str]:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise ValueError("it is not text") from None
        if name in self._sums and segment_sum(text) != self._sums[name]:
            raise ValueError("its checksum differs" if text.strip("\0 \n") else "it is empty")
        lines = {int(parse_line(line)["step"]): line for line in text.splitlines()}
        if not lines:
            raise ValueError("it is empty")
        return lines

    def _from_merged(self, name: str, first: int, last: int) -> dict[int, str] | None:
        """The segment's lines in metrics.jsonl; None if that does not have all of them unchanged."""
        if self._merged is None:
            self._merged = read_merged(self._run_dir)
        lines = {step: self._merged[step] for step in range(first, last + 1) if step in self._merged}
        text = "".join(f"{line}\n" for line in lines.values())
        is_whole = segment_sum(text) == self._sums[name] if name in self._sums else len(lines) == last + 1 - first
        return lines if is_whole and lines else None


def read_merged(run_dir: str) -> dict[int, str]:
    """The readable lines of metrics.jsonl by step; {} without the file."""
    try:
        data = storage.read_bytes(storage.join(run_dir, "metrics.jsonl"))
    except storage.MissingFile:
        return {}
    lines = {}
    for line in data.decode(errors="replace").splitlines():
        try:
            lines[int(parse_line(line)["step"])] = line
        except ValueError:
            continue
    return lines


def as_text(lines: list[dict[str, Any]]) -> str:
    """The text of a segment with these lines."""
    return "".join(json.dumps(line) + "\n" for line in lines)
