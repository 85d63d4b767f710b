"""Keys and passwords out of texts that are kept or shown: in addresses, by their well-known shapes, and what the environment
holds under names such as …_KEY or …_TOKEN, whatever it looks like.
"""

from __future__ import annotations

import html
import json
import os
import re
from typing import Any

_WORD = r"(?:token|key|secret|signature|sig|credential|password)"
_SECRETS = (
    # user:password, whatever is in it but no port; then a user alone
    (re.compile(r"(\w+://)(?:[^\s\"'</@:]*:(?!\d+(?:[/\s\"']|$))[^\s\"'<]*|[^/@\s\"'<]+)@"), r"\1…@"),
    (
        re.compile(rf"([?&;](?:[\w-]*[-_])?(?:{_WORD}|\w*AccessKeyId)(?:[-_][\w-]*)?=)[^&\s\"'<;]+", re.IGNORECASE),
        r"\1…",
    ),
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|sk-(?=[\w-]*\d)[\w-]{20,}|gh[opsu]_\w{30,}|github_pat_\w{20,})"
        ),
        "…",
    ),
    (re.compile(r"\b(B(?:earer|asic)\s+)(?=\S*[\d+/=]|\S{20})[\w.~+/=-]{12,}"), r"\1…"),
)
_NAMES = re.compile(r"(?:(?:^|_)(?:KEYS?|TOKENS?|PASS)|SECRETS?|PASSWORD|PASSWD|_KEY_ID)$", re.IGNORECASE)
_SHORTEST = 8  # characters: what is shorter may be any word
_CERTAIN = 16  # characters of a value that nobody writes by chance


def redacted(text: str) -> str:
    """The text with … in place of what opens something."""
    for value in _of_environment():
        for form in {value, html.escape(value), repr(value)[1:-1], json.dumps(value)[1:-1]}:
            text = text.replace(form, "…")
    return without_shapes(text)


def without_shapes(text: str) -> str:
    """As `redacted`, by shape alone: the same on any machine."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def holds_secret(text: str) -> bool:
    """Whether there is one in it, by its shape, or one of the environment's that is no common word."""
    return without_shapes(text) != text or any(len(v) >= _CERTAIN and v in text for v in _of_environment())


def _of_environment() -> list[str]:
    """Values of variables that are named like secrets, the longest first; of several in one, each too."""
    found = set()
    for name, value in os.environ.items():
        if _NAMES.search(name):
            found |= {value.strip(), *re.split(r"[,\s]+", value)}
    return sorted(
        (v for v in found if len(v) >= _SHORTEST and not re.fullmatch(r"[a-z]{1,12}", v)), key=len, reverse=True
    )


def redacted_tree(tree: Any) -> Any:
    """The same in each text of what JSON can say."""
    if isinstance(tree, str):
        return redacted(tree)
    if isinstance(tree, dict):
        return {key: redacted_tree(value) for key, value in tree.items()}
    return [redacted_tree(value) for value in tree] if isinstance(tree, list | tuple) else tree
