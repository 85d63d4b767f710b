"""The answers of both models as `compare` left them: evaluate/generations.jsonl, read. Knows neither models nor metrics.

Keys of a line that are unknown here are kept and may be asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ftray import storage
from ftray.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """A held-out question, its reference answer, and what base and tuned model answered. line: all keys of its line."""

    question: str
    reference: str
    base: str
    tuned: str
    line: dict[str, Any]

    def value(self, key: str) -> str | None:
        """What the line holds under a key, there or in a mapping one level below (`{"columns": {key: …}}`)."""
        below = [v for v in self.line.values() if isinstance(v, dict)]
        return next((str(place[key]) for place in (self.line, *below) if place.get(key) is not None), None)


def read_generations(run_dir: str) -> list[Generation]:
    """All answers of a run, in the order of their questions.

    Raises ConfigError when there are none yet, StorageError.
    """
    uri = storage.join(run_dir, "evaluate", "generations.jsonl")
    remedy = "run `ftray evaluate` first, with a metric that needs answers (rouge or format)"
    try:
        lines = [json.loads(line) for line in storage.read_bytes(uri).splitlines() if line.strip()]
        found = [Generation(g["question"], g.get("reference") or "", g["base"], g["tuned"], g) for g in lines]
    except storage.MissingFile:
        raise ConfigError(f"{uri} is missing, so there are no answers to compare; {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{uri} is damaged; delete it together with results.json, then run `ftray evaluate`"
        ) from None
    if not found:
        raise ConfigError(f"{uri} is empty, so there are no answers to compare; {remedy}")
    return found
