"""A conversation → the text that the template writes, cut where tokens must not reach across. Knows no tokenizer.

The text is cut before and after each answer: where the text ends that the template writes for the turns before it with
the generation prompt, and where the text of the turns up to it ends. Templates that rewrite earlier turns (they leave
thoughts out of all answers but the last, for example) write no text that holds every answer behind its own prompt.
Then each answer is a document of its own: its prompt, as the endpoint would be asked, and the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ftray.chat.messages import Message
from ftray.chat.template import Rendered, compiled
from ftray.chat.template_analysis import only_copies
from ftray.chat.template_budget import TemplateLimitError
from ftray.errors import DataError

MARK, BLANK = "\ue0f7", "\u2003"  # around the places of texts in a rendered shape; in no template that is used so
PLACE = re.compile(f"({BLANK}?){MARK}(\\d+){MARK}({BLANK}?)")
MAX_SHAPES = 1000

Segment = tuple[str, bool]  # a text that is tokenized by itself, and whether it is learned
Document = list[Segment]


class TemplateSegmenter:
    """A chat template. names: its variables, as the tokenizer's special tokens. uses_marks: whether what its
    `{% generation %}` marks name is learned, instead of the whole turn."""

    def __init__(self, template: str, names: dict[str, str]) -> None:
        self._template, self._names = template, names
        self._shapes: dict[tuple[tuple[str, bool], ...], _Shape | None] = {}
        self._missing_roles: dict[str, str | None] = {}
        self.uses_marks = False

    @property
    def has_marks(self) -> bool:
        """Whether the template has `{% generation %}` marks."""
        return compiled(self._template).has_marks

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The conversation as the template writes it. Raises DataError where it can't."""
        if not messages:
            raise DataError("the conversation begins with the assistant; begin with a system or user turn")
        for role in {m.role for m in messages} & {"system", "tool"}:
            if (reason := self._why_not(role)) is not None:
                where = "the first user turn" if role == "system" else "a user turn"
                raise DataError(f"the chat template has no {role} role ({reason}); put its text into {where}")
        try:
            return self._run(messages, add_generation_prompt)
        except TemplateLimitError as err:
            raise DataError(str(err)) from None
        except Exception as err:  # noqa: BLE001 - a template may raise anything: jinja's errors, or raise_exception()
            raise DataError(f"the chat template refuses the conversation: {_one_line(err)}") from None

    def cut_prompt(self, messages: Sequence[Message]) -> list[str]:
        """The text up to and with the generation prompt, cut around each answer that the template hasn't rewritten."""
        full = self.render(messages, add_generation_prompt=True).text
        cuts = [border for pair in self._borders(full, messages) if pair is not None for border in pair]
        return [full[a:b] for a, b in zip([0, *cuts], [*cuts, len(full)], strict=True)]

    def cut_example(self, messages: Sequence[Message]) -> list[Document]:
        """The documents of a conversation: one, or one for each learned answer where the template rewrites earlier turns.

        Raises DataError, as `render`, and where no prompt of the endpoint would match the text.
        """
        rendered = self.render(messages)
        borders = self._borders(rendered.text, messages)
        if None in borders:
            answers = [i for i, m in enumerate(messages) if m.role == "assistant" and m.train]
            return [self._answer(messages[: i + 1]) for i in answers]
        turns = [m for m in messages if m.role == "assistant"]
        document: Document = []
        done = 0
        for turn, (start, end) in zip(turns, borders, strict=True):  # type: ignore[misc]
            document += [(rendered.text[done:start], False), *self._marked(rendered, start, end, turn.train)]
            done = end
        return [[*document, (rendered.text[done:], False)]]

    def cut_by_shape(self, messages: Sequence[Message]) -> list[Document]:
        """`cut_example`, from a rendering of other texts in the same roles where that is known to be the same."""
        key = tuple([(m.role, bool(m.content)) for m in messages])
        if key not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._find_shape(key)
        shape = self._shapes[key]
        if shape is None:
            return self.cut_example(messages)
        document = []
        for parts, turn in shape:
            text = "".join([part if isinstance(part, str) else part.of(messages) for part in parts])
            document.append((text, turn is not None and messages[turn].train))
        return [document]

    def _borders(self, full: str, messages: Sequence[Message]) -> list[tuple[int, int] | None]:
        """Of each assistant turn: where it begins and ends in the text, or None where the template rewrote it."""
        borders: list[tuple[int, int] | None] = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                head, through = self.render(messages[:i], add_generation_prompt=True), self.render(messages[: i + 1])
                holds = full.startswith(head.text) and full.startswith(through.text)
                borders.append((len(head.text), len(through.text)) if holds else None)
        return borders

    def _answer(self, messages: Sequence[Message]) -> Document:
        """The last turn behind its prompt, which is cut as the endpoint's."""
        prompt = self.cut_prompt(messages[:-1])
        rendered, start = self.render(messages), sum(map(len, prompt))
        if not rendered.text.startswith("".join(prompt)):
            raise DataError(
                f"the chat template writes another prompt for the answer of turn {len(messages) - 1} than the endpoint would "
                "be given; use a base with another template"
            )
        return [*((text, False) for text in prompt), *self._marked(rendered, start, len(rendered.text), True)]

    def _marked(self, rendered: Rendered, start: int, end: int, learned: bool) -> Document:
        """The segments of an answer; learned is all of it, or what the template marks."""
        segments: Document = []
        done = start
        for mark in rendered.marks if self.uses_marks else ():
            low, high = max(mark[0], start), min(mark[1], end)
            if low < high:
                segments += [(rendered.text[done:low], False), (rendered.text[low:high], learned)]
                done = high
        return [*segments, (rendered.text[done:end], learned and not self.uses_marks)]

    def _find_shape(self, key: tuple[tuple[str, bool], ...]) -> _Shape | None:
        template = self._template
        if self.uses_marks or not only_copies(template) or MARK in template or BLANK in template:
            return None
        texts = [f"{BLANK}{MARK}{i}{MARK}{BLANK}" if said else "" for i, (_, said) in enumerate(key)]
        try:
            documents = self.cut_example([Message(role, text) for (role, _), text in zip(key, texts, strict=True)])
        except DataError:
            return None
        if len(documents) != 1 or len(documents[0]) != 2 * sum(role == "assistant" for role, _ in key) + 1:
            return None
        turns = [i for i, (role, _) in enumerate(key) if role == "assistant"]
        shape: list[tuple[list[str | _TextSpan], int | None]] = []
        for n, (text, _) in enumerate(documents[0]):
            pieces = PLACE.split(text)  # literal, blank, number, blank, literal, …
            parts: list[str | _TextSpan] = [pieces[0]]
            for before, number, after, literal in zip(*(pieces[k::4] for k in (1, 2, 3, 4)), strict=True):
                if before != after:
                    return None  # trimmed on one side, or together with what stands beside it
                parts += [_TextSpan(int(number), trimmed=not before), literal]
            shape.append(([p for p in parts if p != ""], turns[n // 2] if n % 2 else None))
        return shape

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return compiled(self._template).render(turns, add_generation_prompt, **self._names)

    def _why_not(self, role: str) -> str | None:
        """Why the template can't show turns of a role, seen on a probe; None if it can. Some leave them out in silence."""
        if role not in self._missing_roles:
            rest = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
            at = 0 if role == "system" else 2
            probe = [*rest[:at], Message(role, "7919"), *rest[at:]]
            self._missing_roles[role] = None
            try:
                self._run(rest, True)
                if "7919" not in self._run(probe, True).text:
                    self._missing_roles[role] = "it leaves such turns out"
            except Exception as err:  # noqa: BLE001 - as in `render`
                if not _fails(lambda: self._run(rest, True)):
                    self._missing_roles[role] = _one_line(err)
        return self._missing_roles[role]


@dataclass(frozen=True)
class _TextSpan:
    """Where a turn's text stands in a segment."""

    turn: int
    trimmed: bool

    def of(self, messages: Sequence[Message]) -> str:
        text = messages[self.turn].content
        return text.strip() if self.trimmed else text


_Shape = list[tuple[list[str | _TextSpan], int | None]]  # segments: their parts, and whose turn each is


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _fails(action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception:  # noqa: BLE001 - as in `render`
        return True
    return False
