"""The templates of public models that TRL's package has: the same promises as for our own short ones.

`pip download trl==1.16.0 --no-deps`, unpack it, and put the directory on PYTHONPATH. Nothing of it is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ftray.chat import ChatFormat
from ftray.errors import DataError
from tests.chat_templates import CONVERSATIONS, broken_promises, differences, tokenizer_for

SPEC = importlib.util.find_spec("trl")
DIRECTORY = Path(SPEC.origin).parent / "chat_templates" if SPEC is not None and SPEC.origin else None
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")  # they read contents as lists of parts only
OTHER_MARKS = (
    "diffusion_gemma_training",
)  # leaves out the token that ends a call, and what the endpoint's prompt lacks
REASONS = (
    "leaves out tools",
    "leaves out tool calls",
    "leaves out the reasoning",
    "leaves out or changes the text",
    "has no tool role",
    "has no system role",
    "writes one per turn",
    "the prompt of this chat template closes the reasoning",
    "after another prompt than the endpoint would receive",
)
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.jinja")) if DIRECTORY else []


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(PARTS_ONLY)])
def test_ids_and_masks_of_public_templates_keep_their_promises(name: str) -> None:
    assert DIRECTORY is not None
    chat = ChatFormat(tokenizer_for((DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")))
    broken, refused = [], []
    for kind, conversation in CONVERSATIONS.items():
        try:
            broken += [f"{kind}: {promise}" for promise in broken_promises(chat, conversation)]
            ids, mask = differences(chat, conversation)
        except DataError as err:
            refused.append(f"{kind}: {err}")
            continue
        if ids == "ids" or (mask == "mask" and name not in OTHER_MARKS):
            broken.append(f"{kind}: {ids} {mask}")
    assert broken == []
    assert [line for line in refused if not any(reason in line for reason in REASONS)] == []


@pytest.mark.skipif(DIRECTORY is None, reason="TRL's package is not on the path")
def test_there_are_templates() -> None:
    assert len(NAMES) > 60
