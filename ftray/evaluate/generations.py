"""The answers of both models as `compare` left them: evaluate/generations.jsonl, read. Knows neither models nor metrics.

Other keys of a line are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftray import storage
from ftray.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """A held-out question, its reference answer, and what base and tuned model answered. slice: "" where there is none."""

    question: str
    reference: str
    base: str
    tuned: str
    slice: str = ""


def read_generations(run_dir: str) -> list[Generation]:
    """All answers of a run, in the order of their questions.

    Raises ConfigError when there are none yet, StorageError.
    """
    uri = storage.join(run_dir, "evaluate", "generations.jsonl")
    remedy = "run `ftray evaluate` first, with a metric that needs answers (rouge or format)"
    try:
        lines = [storage.parse_object(line) for line in storage.read_bytes(uri).splitlines() if line.strip()]
        found = [_generation(line) for line in lines]
    except storage.MissingFile:
        raise ConfigError(f"{uri} is missing, so there are no answers to compare; {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{uri} is damaged; delete it together with results.json, then run `ftray evaluate`"
        ) from None
    if not found:
        raise ConfigError(f"{uri} is empty, so there are no answers to compare; {remedy}")
    return found


def _generation(line: dict[str, Any]) -> Generation:
    name = line.get("slice")
    return Generation(
        str(line["question"]),
        str(line.get("reference") or ""),
        str(line["base"]),
        str(line["tuned"]),
        "" if name is None else str(name),
    )
