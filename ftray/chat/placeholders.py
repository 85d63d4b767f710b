"""Cuts many conversations of the same roles with one rendering, if the template only copies the messages' texts.

A rendering of placeholders instead of the texts shows that (`template.Placeholder`): it fails if the template does anything
with a text but copying it. Where each text belongs is then known for all conversations of this shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftray.chat.messages import Conversation, Message
from ftray.chat.renderer import TemplateRenderer
from ftray.chat.segments import Document, TemplateSegmenter
from ftray.chat.template_limits import MARK
from ftray.chat.turn_shape import TurnShape
from ftray.errors import DataError

if TYPE_CHECKING:
    from ftray.chat.template import Rendered

BLANK = "\u2003"  # around the placeholder of a text: shows where the template strips it
PLACEHOLDER = re.compile(f"({BLANK}?){MARK}(\\d+){MARK}({BLANK}?)")
MAX_SHAPES = 1000

ShapeKey = tuple[tuple[str, bool], ...]  # of each message: its role, and whether it has a text


class ShapeCache:
    """Cuts conversations as a segmenter's `cut_example` does, faster.

    Args:
        segmenter: Cuts the conversations that need a rendering of their own.
    """

    def __init__(self, segmenter: TemplateSegmenter) -> None:
        self._segmenter = segmenter
        self._shapes: dict[ShapeKey, _Shape | None] = {}
        template = segmenter.renderer.template
        self._only_copies = MARK not in template and BLANK not in template  # until a probe shows the opposite

    def cut(self, conversation: Conversation) -> list[Document]:
        """The documents of a conversation. Raises DataError as `cut_example`."""
        if not conversation.is_plain or not self._segmenter.train_on.is_whole:
            return self._segmenter.cut_example(conversation)
        messages = conversation.messages
        key = tuple([(m.role, bool(m.content)) for m in messages])
        if key not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self.find_shape(key)
        shape = self._shapes[key]
        if shape is None:
            return self._segmenter.cut_example(conversation)
        trained = self._segmenter.trained_turns(conversation)
        return [
            [
                ("".join([part if isinstance(part, str) else part.of(messages) for part in parts]), turn in trained)
                for parts, turn in shape
            ]
        ]

    def find_shape(self, key: ShapeKey) -> _Shape | None:
        """The segments of all conversations of a shape, or None if the template does more than copying their texts."""
        if self._segmenter.uses_marks or not self._only_copies:
            return None
        renderer = _PlaceholderRenderer(self._segmenter.renderer)
        texts = [f"{BLANK}{MARK}{i}{MARK}{BLANK}" if has_text else "" for i, (_, has_text) in enumerate(key)]
        turns = tuple(Message(role, text) for (role, _), text in zip(key, texts, strict=True))
        try:
            documents = self._segmenter.with_renderer(renderer).cut_example(Conversation(turns))
        except DataError:
            self._only_copies = not renderer.inspects_texts
            return None
        answers = [i for i, (role, _) in enumerate(key) if role == "assistant"]
        if len(documents) != 1 or len(documents[0]) != 2 * len(answers) + 1:
            return None
        shape: list[tuple[list[str | _TextSpan], int | None]] = []
        for n, (text, _) in enumerate(documents[0]):
            pieces = PLACEHOLDER.split(text)  # literal, blank, number, blank, literal, …
            parts: list[str | _TextSpan] = [pieces[0]]
            for before, number, after, literal in zip(*(pieces[k::4] for k in (1, 2, 3, 4)), strict=True):
                if before != after:
                    return None  # stripped on one side, or together with its neighbor
                parts += [_TextSpan(int(number), stripped=not before), literal]
            shape.append(([p for p in parts if p != ""], answers[n // 2] if n % 2 else None))
        return shape


class _PlaceholderRenderer(TemplateRenderer):
    """Renders placeholders instead of the messages' texts."""

    def __init__(self, plain: TemplateRenderer) -> None:
        super().__init__(plain.template, plain.names)
        self._plain = plain
        self.inspects_texts = False

    def why_missing(self, role: str) -> str | None:
        return self._plain.why_missing(role)

    def try_render(self, conversation: Conversation, add_generation_prompt: bool) -> Rendered:
        from jinja2 import TemplateError

        from ftray.chat.template import Placeholder

        turns = TurnShape().turns(conversation)
        for turn in turns:
            turn["content"] = turn["content"] and Placeholder(turn["content"])
        try:
            return self.run(turns, (), add_generation_prompt)
        except TemplateError:  # it refuses these roles, whatever the texts are
            raise
        except Exception:
            self.inspects_texts = True
            raise


@dataclass(frozen=True)
class _TextSpan:
    """The place of a message's text in a segment."""

    turn: int
    stripped: bool

    def of(self, messages: tuple[Message, ...]) -> str:
        text = messages[self.turn].content
        return text.strip() if self.stripped else text


_Shape = list[tuple[list[str | _TextSpan], int | None]]  # segments: their parts, and the message of an answer
