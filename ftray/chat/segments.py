"""Cuts the text of a rendered conversation at the borders that no token may cross. Knows no tokenizer.

The text is cut before and after each answer: at the end of the text that the template renders for the preceding messages
with the generation prompt, and at the end of the text for the messages up to and including the answer. Some templates
rewrite earlier messages (they drop the reasoning of all answers but the last, for example), so that no single text contains
each answer after its own prompt. Then each answer becomes a document of its own: the prompt that the endpoint would receive,
and the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftray.chat.messages import Conversation, Message
from ftray.chat.template_limits import MARK, TemplateLimitError
from ftray.errors import DataError

if TYPE_CHECKING:
    from ftray.chat.template import Rendered

BLANK = "\u2003"  # around the placeholder of a text: shows where the template strips it
PLACEHOLDER = re.compile(f"({BLANK}?){MARK}(\\d+){MARK}({BLANK}?)")
MAX_SHAPES = 1000

Segment = tuple[str, bool]  # a text that is tokenized separately, and whether it is trained on
Document = list[Segment]
ShapeKey = tuple[tuple[str, bool], ...]  # of each message: its role, and whether it has a text


class TemplateSegmenter:
    """Renders conversations with a chat template and cuts them into segments.

    Args:
        template: The template's source.
        names: Special tokens by the names under which the template knows them.

    Attributes:
        uses_marks: Whether the text in the template's `{% generation %}` blocks is trained on, instead of whole answers.
    """

    def __init__(self, template: str, names: dict[str, str]) -> None:
        self._template, self._names = template, names
        self._shapes: dict[ShapeKey, _Shape | None] = {}
        self._only_copies = MARK not in template and BLANK not in template  # until a probe shows the opposite
        self._missing_roles: dict[str, str | None] = {}
        self.uses_marks = False

    @property
    def has_marks(self) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        from ftray.chat.template import compiled

        return compiled(self._template).has_marks

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> Rendered:
        """Renders a conversation.

        Raises:
            DataError: The template cannot render it.
        """
        if not conversation.messages:
            raise DataError("the conversation begins with the assistant; begin with a system or user turn")
        for role in {m.role for m in conversation.messages} & {"system", "tool"}:
            if (reason := self._why_missing(role)) is not None:
                where = "the first user turn" if role == "system" else "a user turn"
                raise DataError(f"the chat template has no {role} role ({reason}); put its text into {where}")
        try:
            return self._run(conversation, add_generation_prompt)
        except TemplateLimitError as err:
            raise DataError(str(err)) from None
        except Exception as err:  # noqa: BLE001 - a template may raise anything: jinja's errors, or raise_exception()
            raise DataError(f"the chat template refuses the conversation: {_one_line(err)}") from None

    def cut_prompt(self, conversation: Conversation) -> list[str]:
        """The text up to and including the generation prompt, cut around each answer that the template has not rewritten."""
        full = self.render(conversation, add_generation_prompt=True).text
        cuts = [border for pair in self._borders(full, conversation) if pair is not None for border in pair]
        return [full[a:b] for a, b in zip([0, *cuts], [*cuts, len(full)], strict=True)]

    def cut_example(self, conversation: Conversation) -> list[Document]:
        """Cuts a conversation into documents: one, or one per trained answer if the template rewrites earlier messages.

        Raises:
            DataError: The template cannot render it, or no prompt of the endpoint would match the text.
        """
        rendered, messages = self.render(conversation), conversation.messages
        borders = self._borders(rendered.text, conversation)
        if None in borders:
            answers = [i for i, m in enumerate(messages) if m.role == "assistant" and m.train]
            return [self._answer(conversation.until(i + 1)) for i in answers]
        answered = [m for m in messages if m.role == "assistant"]
        document: Document = []
        end_of_last = 0
        for message, (start, end) in zip(answered, borders, strict=True):  # type: ignore[misc]
            document += [(rendered.text[end_of_last:start], False)]
            document += self._marked(rendered, start, end, message.train)
            end_of_last = end
        return [[*document, (rendered.text[end_of_last:], False)]]

    def cut_by_shape(self, conversation: Conversation) -> list[Document]:
        """`cut_example`, without a rendering if another conversation with the same roles has had one.

        That works if the template only copies the messages' texts, which a rendering of placeholders shows.
        """
        messages = conversation.messages
        key = tuple([(m.role, bool(m.content)) for m in messages])
        if key not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._find_shape(key)
        shape = self._shapes[key]
        if shape is None:
            return self.cut_example(conversation)
        document = []
        for parts, turn in shape:
            text = "".join([part if isinstance(part, str) else part.of(messages) for part in parts])
            document.append((text, turn is not None and messages[turn].train))
        return [document]

    def _borders(self, full: str, conversation: Conversation) -> list[tuple[int, int] | None]:
        """The start and end of each answer in the text, or None if the template rewrote it."""
        borders: list[tuple[int, int] | None] = []
        for i, message in enumerate(conversation.messages):
            if message.role == "assistant":
                head = self.render(conversation.until(i), add_generation_prompt=True)
                through = self.render(conversation.until(i + 1))
                holds = full.startswith(head.text) and full.startswith(through.text)
                borders.append((len(head.text), len(through.text)) if holds else None)
        return borders

    def _answer(self, conversation: Conversation) -> Document:
        """The last message after its prompt, which is cut as for the endpoint."""
        last = len(conversation.messages) - 1
        prompt = self.cut_prompt(conversation.until(last))
        rendered, start = self.render(conversation), sum(map(len, prompt))
        if not rendered.text.startswith("".join(prompt)):
            raise DataError(
                f"the chat template renders turn {last} after another prompt than the endpoint would receive; "
                "use a base with another template"
            )
        return [*((text, False) for text in prompt), *self._marked(rendered, start, len(rendered.text), True)]

    def _marked(self, rendered: Rendered, start: int, end: int, trained: bool) -> Document:
        """The segments of an answer. All of it is trained on, or the marked parts."""
        segments: Document = []
        end_of_last = start
        for mark in rendered.marks if self.uses_marks else ():
            low, high = max(mark[0], start), min(mark[1], end)
            if low < high:
                segments += [(rendered.text[end_of_last:low], False), (rendered.text[low:high], trained)]
                end_of_last = high
        return [*segments, (rendered.text[end_of_last:end], trained and not self.uses_marks)]

    def _find_shape(self, key: ShapeKey) -> _Shape | None:
        if self.uses_marks or not self._only_copies:
            return None
        probe = _PlaceholderSegmenter(self._template, self._names)
        texts = [f"{BLANK}{MARK}{i}{MARK}{BLANK}" if has_text else "" for i, (_, has_text) in enumerate(key)]
        try:
            turns = tuple(Message(role, text) for (role, _), text in zip(key, texts, strict=True))
            documents = probe.cut_example(Conversation(turns))
        except DataError:
            self._only_copies = not probe.inspects_texts
            return None
        if len(documents) != 1 or len(documents[0]) != 2 * sum(role == "assistant" for role, _ in key) + 1:
            return None
        answers = [i for i, (role, _) in enumerate(key) if role == "assistant"]
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

    def _run(self, conversation: Conversation, add_generation_prompt: bool) -> Rendered:
        from ftray.chat.template import compiled

        turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
        return compiled(self._template).render(turns, add_generation_prompt, **self._names)

    def _why_missing(self, role: str) -> str | None:
        """The reason why the template cannot show messages of a role, or None. A probe shows it: some drop them silently."""
        if role not in self._missing_roles:
            rest = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
            at = 0 if role == "system" else 2
            probe = [*rest[:at], Message(role, "7919"), *rest[at:]]
            self._missing_roles[role] = None
            try:
                self._run(Conversation(tuple(rest)), True)
                if "7919" not in self._run(Conversation(tuple(probe)), True).text:
                    self._missing_roles[role] = "it leaves such turns out"
            except Exception as err:  # noqa: BLE001 - as in `render`
                if self._renders(Conversation(tuple(rest))):
                    self._missing_roles[role] = _one_line(err)
        return self._missing_roles[role]

    def _renders(self, conversation: Conversation) -> bool:
        try:
            self._run(conversation, True)
        except Exception:  # noqa: BLE001 - as in `render`
            return False
        return True


class _PlaceholderSegmenter(TemplateSegmenter):
    """Renders placeholders instead of the messages' texts."""

    inspects_texts = False

    def _run(self, conversation: Conversation, add_generation_prompt: bool) -> Rendered:
        from jinja2 import TemplateError

        from ftray.chat.template import Placeholder, compiled

        turns = [{"role": m.role, "content": m.content and Placeholder(m.content)} for m in conversation.messages]
        try:
            return compiled(self._template).render(turns, add_generation_prompt, **self._names)
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

    def of(self, messages: Sequence[Message]) -> str:
        text = messages[self.turn].content
        return text.strip() if self.stripped else text


_Shape = list[tuple[list[str | _TextSpan], int | None]]  # segments: their parts, and the message of an answer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
