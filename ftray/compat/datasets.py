"""Private APIs of datasets. Seen with datasets 4.0 and newer; contract test: tests/unit/test_compat.py."""

from __future__ import annotations

from typing import Any


def fingerprint(dataset: Any) -> str:
    """A hash of a dataset's content and history.

    Reason: the documentation describes the fingerprint, but the attribute is private.
    """
    return str(dataset._fingerprint)
