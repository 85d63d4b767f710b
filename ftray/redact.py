"""Keys and passwords out of texts that are kept or shown: in addresses, by their well-known shapes, and what the environment
holds under names such as …_KEY or …_TOKEN, whatever it looks like.
"""

from __future__ import annotations

import os
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
_NAMES = re.compile(r"(?:^|_)(?:KEYS?|TOKEN|SECRET|PASSWORD|PASSWD)$|_KEY_ID$", re.IGNORECASE)
_SHORTEST = 8  # characters: what is shorter may be any word


def redacted(text: str) -> str:
    """The text with … in place of what opens something."""
    for value in _of_environment():
        text = text.replace(value, "…")
    return without_shapes(text)


def without_shapes(text: str) -> str:
    """As `redacted`, by shape alone: the same on any machine."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def _of_environment() -> list[str]:
    """Values of variables that are named like secrets, the longest first; of several in one, each."""
    found = [part for name, value in os.environ.items() if _NAMES.search(name) for part in re.split(r"[,\s]+", value)]
    return sorted((part for part in found if len(part) >= _SHORTEST), key=len, reverse=True)


def redacted_tree(tree: Any) -> Any:
    """The same in each text of what JSON can say."""
    if isinstance(tree, str):
        return redacted(tree)
    if isinstance(tree, dict):
        return {key: redacted_tree(value) for key, value in tree.items()}
    return [redacted_tree(value) for value in tree] if isinstance(tree, list | tuple) else tree
