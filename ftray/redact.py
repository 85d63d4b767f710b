"""Keys and passwords out of texts that are kept or shown: in addresses, and by their well-known shapes."""

from __future__ import annotations

import re
from typing import Any

_SECRETS = (
    (re.compile(r"(\w+://)[^/@\s\"'<]+@"), r"\1…@"),
    (
        re.compile(
            r"([?&;][\w-]*(?:token|key|secret|signature|credential|password)[\w-]*=)[^&\s\"'<;]+", re.IGNORECASE
        ),
        r"\1…",
    ),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|sk-[\w-]{20,})"), "…"),
    (re.compile(r"\b(Bearer\s+)[\w.~+/=-]{12,}"), r"\1…"),
)


def redacted(text: str) -> str:
    """The text with … in place of what opens something."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def redacted_tree(tree: Any) -> Any:
    """The same in each text of what JSON can say."""
    if isinstance(tree, str):
        return redacted(tree)
    if isinstance(tree, dict):
        return {key: redacted_tree(value) for key, value in tree.items()}
    return [redacted_tree(value) for value in tree] if isinstance(tree, list | tuple) else tree
