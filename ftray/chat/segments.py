"""Cuts the text of a rendered conversation at the borders that no token may cross. Knows no tokenizer.

The text is cut before and after each answer: where the text ends that the template renders for the preceding messages with
the generation prompt, and where the answer ends (`answer_text`). Some templates rewrite earlier messages (they drop the reasoning
of all answers but the last, for example), so that no single text contains each answer after its own prompt. Then each answer
becomes a document of its own: the prompt that the endpoint would receive, and the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ftray.chat.answer_text import OPENING, AnswerReader, AnswerText, Ending
from ftray.chat.messages import Conversation, Message
from ftray.chat.renderer import TemplateRenderer, check_answer, check_context, shared_length
from ftray.chat.train_on import Ranges, TrainOn, trained_ranges
from ftray.chat.turn_shape import ANSWER, CALLING, CALLING_TWICE, QUESTION, THOUGHT
from ftray.errors import DataError

if TYPE_CHECKING:
    from ftray.chat.template import Rendered

# A text that is tokenized separately, and what is trained on: all of it up to its last special token, nothing, or ranges of it.
Segment = tuple[str, bool | Ranges]
Document = list[Segment]
WHOLE = TrainOn()
MAX_VARIANTS = 16  # values of a template's variables whose segmenters are kept


class TemplateSegmenter:
    """Cuts the texts of a chat template into segments.

    Args:
        renderer: Renders with the template.
        specials: The special tokens of the tokenizer.
        train_on: The parts of answers to train on.

    Attributes:
        uses_marks: Whether the text in the template's `{% generation %}` blocks is trained on, instead of whole answers.
    """

    def __init__(self, renderer: TemplateRenderer, specials: Collection[str] = (), train_on: TrainOn = WHOLE) -> None:
        self.renderer, self.train_on = renderer, train_on
        self._specials = specials
        pattern = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
        self._special = re.compile(pattern) if pattern else None
        self._around = re.compile(rf"\s*(?:{pattern})\s*") if pattern else None
        self._variants: dict[str, TemplateSegmenter] = {}
        self._reader = AnswerReader(renderer, specials)
        self.uses_marks = False

    def with_renderer(self, renderer: TemplateRenderer) -> TemplateSegmenter:
        """A segmenter of the same template whose texts are rendered otherwise."""
        other = TemplateSegmenter(renderer, self._specials, self.train_on)
        other._reader = AnswerReader(renderer, self._specials, self.ending)
        return other

    def with_variables(self, variables: Mapping[str, Any]) -> TemplateSegmenter:
        """A segmenter of the same template with values for its variables."""
        if not variables:
            return self
        key = json.dumps(variables, sort_keys=True)
        if key not in self._variants:
            if len(self._variants) >= MAX_VARIANTS:
                self._variants.clear()
            self._variants[key] = self.with_renderer(self.renderer.with_names(variables))
        return self._variants[key]

    @property
    def has_marks(self) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        from ftray.chat.template import compiled

        return compiled(self.renderer.template).has_marks

    @property
    def ending(self) -> Ending:
        """How the template ends an answer."""
        return self._reader.ending

    @cached_property
    def answer_prompt(self) -> str:
        """What the template writes before every answer, if it has a special token and is no part of an answer; else empty.

        The template may write an answer as several messages with the same beginning each (harmony).
        """
        question = Conversation((QUESTION,))
        prompt = self.render(question, add_generation_prompt=True).text
        prompt = OPENING.sub("", prompt[shared_length(prompt, self.render(question).text) :])
        if not self._special or not self._special.search(prompt):
            return ""
        thought = THOUGHT if self.renderer.shape.reasoning_key else ""
        calls = CALLING_TWICE if self.renderer.shape.writes_several_calls else CALLING
        answers = (Message("assistant", ANSWER), *([calls] if self.renderer.shape.writes_calls else []))
        for answer in answers:
            try:
                text = self.render(Conversation((QUESTION, replace(answer, reasoning=thought)))).text
            except DataError:  # it writes calls in longer conversations only
                continue
            if text.count(prompt) > 1:
                return ""
        return prompt

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> Rendered:
        """Renders a conversation. Raises DataError if the template cannot."""
        return self.renderer.render(conversation, add_generation_prompt)

    def cut_prompt(self, conversation: Conversation) -> list[str]:
        """The text up to and including the generation prompt, cut around each answer that the template has not rewritten."""
        with self.renderer.memo():
            return self._cut_prompt(conversation)

    def _cut_prompt(self, conversation: Conversation) -> list[str]:
        full = self.render(conversation, add_generation_prompt=True).text
        cuts = [0]
        for start, end, _ in self._answers(full, conversation).values():
            cuts += [start, end]
        return [full[a:b] for a, b in zip(cuts, [*cuts[1:], len(full)], strict=True)]

    def cut_example(self, conversation: Conversation) -> list[Document]:
        """Cuts a conversation into documents: one, or one per trained answer if the template rewrites earlier messages.

        Raises:
            DataError: The template cannot render it or leaves something out, or no prompt of the endpoint would match the text.
        """
        with self.renderer.memo():
            return self._cut_example(conversation)

    def _cut_example(self, conversation: Conversation) -> list[Document]:
        rendered, messages = self.render(conversation), conversation.messages
        check_context(conversation, rendered.text)
        text = self._closed(rendered.text, messages[-1])
        trained = self.trained_turns(conversation)
        answers = self._answers(text, conversation)
        if any(i not in answers for i in trained):
            return [self._document(conversation.until(i + 1)) for i in trained]
        document: Document = []
        end_of_last = 0
        for i, (start, end, answer) in answers.items():
            document.append((text[end_of_last:start], False))
            if i in trained:
                self._check(answer, messages[i], i)
                marks = _trim(_clip(rendered.marks, start, end), text[start:end], answer.body)
                document.append(
                    (text[start:end], self._trained(answer, conversation.until(i + 1), text[:start], marks))
                )
            else:
                document.append((text[start:end], False))
            end_of_last = end
        # Some templates write an end token that only the last turn of a text has; their marks include it.
        marks = (
            _clip(rendered.marks, end_of_last, len(text)) if self.uses_marks and len(messages) - 1 in trained else ()
        )
        tail = _trim(marks, text[end_of_last:], 0)
        document.append((text[end_of_last:], tail or False))
        return [document]

    def trained_texts(self, text: str, trained: bool | Ranges) -> list[str]:
        """The parts of a segment that are trained on."""
        if not isinstance(trained, bool):
            return [text[start:end] for start, end in trained]
        ends = [match.end() for match in self._special.finditer(text)] if trained and self._special else []
        return [text[: ends[-1]] if ends else text] if trained and text else []

    def without_specials(self, text: str) -> str:
        """A text without special tokens and the white space around them."""
        return " ".join(self._around.split(text)) if self._around else text

    def trained_turns(self, conversation: Conversation) -> list[int]:
        """The numbers of the answers that are trained on."""
        if self.train_on == WHOLE:
            return [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.train]
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if self.train_on.last_turn_only:
            turns = turns[-1:]
        return [i for i in turns if conversation.messages[i].train and self.train_on.selects(conversation.messages[i])]

    def _closed(self, text: str, last: Message) -> str:
        """A text that ends with an answer, with the token that ends it, also where the template leaves that to the next turn."""
        token = self.ending.next_token_after_calls if last.tool_calls else self.ending.next_token
        return text.rstrip().removesuffix(token) + token if token and last.role == "assistant" else text

    def _answers(self, text: str, conversation: Conversation) -> dict[int, tuple[int, int, AnswerText]]:
        """Where each answer begins and ends in a text, by turn, without those that the template has rewritten."""
        answers: dict[int, tuple[int, int, AnswerText]] = {}
        end_of_last = 0
        for i, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            prompt = self.render(conversation.until(i), add_generation_prompt=True).text
            start = len(prompt)
            if start < end_of_last or not text.startswith(prompt):
                continue
            try:
                answer = self._reader.read(conversation.until(i + 1), prompt)
            except DataError:  # of a trained answer it is raised by `_document`
                continue
            if text.startswith(answer.text[: answer.end], start):
                end = start + answer.end
                rest = answer.text[answer.end :]
                after = rest[: shared_length(rest, text[end : end + len(rest)])]
                end_of_last = end + len(after) - len(after.lstrip())
                answers[i] = (start, end_of_last, answer)
        return answers

    def _document(self, conversation: Conversation) -> Document:
        """The last message after its prompt, which is cut as for the endpoint."""
        last = len(conversation.messages) - 1
        prompt = self.cut_prompt(conversation.until(last))
        answer = self._reader.read(conversation, "".join(prompt))
        self._check(answer, conversation.messages[last], last)
        text = answer.text
        if not self.uses_marks:
            after = text[answer.end :]
            text = text[: len(text) - len(after.lstrip())]
        marks = _trim(answer.marks, text, answer.body)
        trained = self._trained(answer, conversation, "".join(prompt), marks)
        return [*((part, False) for part in prompt), (text, trained)]

    def _check(self, answer: AnswerText, message: Message, i: int) -> None:
        text = answer.text[: answer.body]
        writes_reasoning = answer.adds_reasoning or self.renderer.shape.reasoning_key is not None
        check_answer(message, i, self._special.sub("\n", text) if self._special else text, writes_reasoning)

    def _trained(self, answer: AnswerText, conversation: Conversation, prompt: str, marks: Ranges) -> bool | Ranges:
        """What is trained on of the last message's text, which follows a prompt."""
        if self.train_on.is_whole:
            return marks if self.uses_marks else True
        *head, message = conversation.messages

        def read_other(other: Message) -> str:
            return self._reader.read(replace(conversation, messages=(*head, other)), prompt).text

        ranges = trained_ranges(answer, message, self.train_on, read_other)
        return tuple(part for mark in marks for part in _clip(ranges, *mark, shift=0)) if self.uses_marks else ranges


def _trim(marks: Ranges, text: str, body: int) -> Ranges:
    """Marks without the white space after the end token, which begins at `body`: the model stops before it."""
    ends = [(a, len(text[:b].rstrip()) if b > body else b) for a, b in marks]
    return tuple((a, b) for a, b in ends if a < b)


def _clip(ranges: Sequence[tuple[int, int]], start: int, end: int, shift: int | None = None) -> Ranges:
    """The parts of ranges in [start, end), counted from start, or from `shift`."""
    base = start if shift is None else shift
    return tuple((max(a, start) - base, min(b, end) - base) for a, b in ranges if a < end and b > start)
