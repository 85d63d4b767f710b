"""Renders conversations with a chat template, in the form that the template reads, and refuses fields that it would leave out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ftray.chat.messages import Conversation, Message
from ftray.chat.template_limits import TemplateLimitError
from ftray.chat.turn_shape import CALLING, LONG_ID, QUESTION, RESULT, TOOL, TurnShape, find_turn_shape
from ftray.errors import DataError, ModelError

if TYPE_CHECKING:
    from ftray.chat.template import Rendered

MARK_TEXT = "7919"  # in probes: a text that no template writes by itself


class TemplateRenderer:
    """Renders conversations with a chat template.

    Args:
        template: The template's source.
        names: Special tokens by the names under which the template knows them.
    """

    def __init__(self, template: str, names: Mapping[str, Any]) -> None:
        self.template, self.names = template, dict(names)
        self._missing_roles: dict[str, str | None] = {}
        self._memo: dict[tuple[int, ...], tuple[Conversation, Rendered]] | None = None

    @cached_property
    def shape(self) -> TurnShape:
        """The form of turns that the template reads. Raises ModelError for a template that exceeds its budget."""
        try:
            return find_turn_shape(self.template, lambda turns, tools, prompt: self.run(turns, tools, prompt).text)
        except TemplateLimitError as err:
            raise ModelError(f"the tokenizer's chat template can't be used: {err}") from None

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template uses besides messages, tools and special tokens."""
        from ftray.chat.template import compiled

        return compiled(self.template).variables - self.names.keys()

    def with_names(self, names: Mapping[str, Any]) -> TemplateRenderer:
        """A renderer for which the template knows more names."""
        return TemplateRenderer(self.template, {**self.names, **names})

    @contextmanager
    def memo(self) -> Iterator[None]:
        """Inside it, each beginning of a conversation is rendered once."""
        is_outer = self._memo is None
        if is_outer:
            self._memo = {}
        try:
            yield
        finally:
            if is_outer:
                self._memo = None

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> Rendered:
        """Renders a conversation.

        Raises:
            DataError: The template cannot render it, or leaves out its tools, tool calls or roles.
        """
        memo = self._memo  # another thread may end its memo meanwhile
        if memo is None:
            return self._render(conversation, add_generation_prompt)
        # The memo holds the conversations, so that no other messages get the same ids.
        key = (int(add_generation_prompt), id(conversation.tools), *map(id, conversation.messages))
        if key not in memo:
            memo[key] = (conversation, self._render(conversation, add_generation_prompt))
        return memo[key][1]

    def _render(self, conversation: Conversation, add_generation_prompt: bool) -> Rendered:
        messages = conversation.messages
        if not messages:
            raise DataError("the conversation begins with the assistant; begin with a system or user turn")
        for role in {"system" if m.role == "developer" else m.role for m in messages} & {"system", "tool"}:
            if (reason := self.why_missing(role)) is not None:
                where = "the first user turn" if role == "system" else "a user turn"
                raise DataError(f"the chat template has no {role} role ({reason}); put its text into {where}")
        self._check_tools(conversation)
        try:
            return self.try_render(conversation, add_generation_prompt)
        except TemplateLimitError as err:
            raise DataError(str(err)) from None
        except Exception as err:  # noqa: BLE001 - a template may raise anything: jinja's errors, or raise_exception()
            raise DataError(f"the chat template refuses the conversation: {one_line(err)}") from None

    def try_render(self, conversation: Conversation, add_generation_prompt: bool) -> Rendered:
        """`render` without checks. Raises whatever the template raises."""
        shape = TurnShape() if conversation.is_plain else self.shape
        return self.run(shape.turns(conversation), conversation.tools, add_generation_prompt)

    def run(
        self, turns: list[dict[str, Any]], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> Rendered:
        """Runs the template. Raises whatever it raises."""
        from ftray.chat.template import compiled

        return compiled(self.template).render(turns, add_generation_prompt, tools, **self.names)

    def _check_tools(self, conversation: Conversation) -> None:
        if conversation.tools and not self.shape.writes_tools:
            raise DataError(
                "the chat template leaves out tools; write them into the system turn, or use another template"
            )
        for i, message in enumerate(conversation.messages):
            if message.tool_calls and not self.shape.writes_calls:
                raise DataError(
                    f"the chat template leaves out tool calls (turn {i}); write them into the content, or use another template"
                )
            if len(message.tool_calls) > 1 and not self.shape.writes_several_calls:
                raise DataError(
                    f"turn {i} has {len(message.tool_calls)} tool calls, but the chat template writes one per turn; split it"
                )

    def why_missing(self, role: str) -> str | None:
        """The reason why the template cannot show messages of a role, or None. A probe shows it: some drop them silently."""
        if role not in self._missing_roles:
            self._missing_roles[role] = None if role == "tool" and self._shows_results() else self._probe(role)
        return self._missing_roles[role]

    def _shows_results(self) -> bool:
        result = Message("tool", RESULT, tool_call_id=LONG_ID, name=TOOL)
        try:
            text = self.try_render(Conversation((QUESTION, CALLING, result)), True).text
        except Exception:  # noqa: BLE001 - as in `render`
            return False
        return RESULT in text and self.shape.writes_calls

    def _probe(self, role: str) -> str | None:
        rest = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
        at = 0 if role == "system" else 2
        probe = [*rest[:at], Message(role, MARK_TEXT), *rest[at:]]
        try:
            self.try_render(Conversation(tuple(rest)), True)
        except Exception:  # noqa: BLE001 - as in `render`: it refuses any conversation, so the role is not the reason
            return None
        try:
            text = self.try_render(Conversation(tuple(probe)), True).text
        except Exception as err:  # noqa: BLE001 - as in `render`
            return one_line(err)
        return None if MARK_TEXT in text else "it leaves such turns out"


def check_context(conversation: Conversation, text: str) -> None:
    """Raises DataError if a rendered text lacks a tool, a call, a result, or the text of a turn.

    The reasoning of earlier answers, and the text beside their calls, may be missing: many templates leave it out, at the
    endpoint as well.
    """
    for tool in conversation.tools:
        if (name := tool["function"]["name"]) not in text:
            raise DataError(f"the chat template leaves out the tool {name}; write the tools into the system turn")
    for i, message in enumerate(conversation.messages):
        content = message.content
        if message.role == "assistant":
            content = "" if message.tool_calls else content.rsplit("</think>", 1)[-1]
            check_calls(message, i, text)
        if not is_shown(content, text):
            raise DataError(
                f"the chat template leaves out or changes the text of turn {i} ({message.role}); write it as the template does"
            )


def check_answer(message: Message, i: int, text: str, writes_reasoning: bool) -> None:
    """Raises DataError if the text of a trained answer lacks its reasoning, its content, or a call.

    Args:
        message: The answer.
        i: Its turn.
        text: What the template writes for it, without special tokens.
        writes_reasoning: Whether it writes reasoning.
    """
    at = place_of(message.reasoning, text, 0)[1] if writes_reasoning or not message.reasoning.strip() else -1
    if at < 0:
        raise DataError(
            f"the chat template leaves out the reasoning of turn {i}; write it into the content, or remove it"
        )
    calls = text[at:]
    for part in message.content.replace("<think>", "</think>").split("</think>"):
        start, at = place_of(part, text, at)
        if at < 0:
            raise DataError(
                f"the chat template leaves out or changes the text of turn {i} (assistant); write it as the template does"
            )
        calls = calls[: len(calls) - len(text) + start] + text[at:]  # a call may not stand in the content
    check_calls(message, i, calls)


def check_calls(message: Message, i: int, text: str) -> None:
    """Raises DataError if a text lacks the name or an argument of one of a message's calls."""
    for call in message.tool_calls:
        missing = [part for part in (call.name, *_leaves(call.arguments)) if not is_shown(part, text)]
        if missing:
            raise DataError(
                f"the chat template leaves out {missing[0][:80]!r} of the tool call {call.name} of turn {i}; use another template"
            )


def is_shown(part: str, text: str) -> bool:
    """Whether a text contains a part, apart from white space around it, as it is or as a JSON string."""
    return place_of(part, text, 0)[0] >= 0


def place_of(part: str, text: str, at: int) -> tuple[int, int]:
    """Where a part, as it is or as a JSON string, first begins and ends behind a place of a text; (-1, -1): nowhere."""
    part = part.strip()
    for written in (part, *(json.dumps(part, ensure_ascii=escaped)[1:-1] for escaped in (False, True))):
        if (start := text.find(written, at)) >= 0:
            return start, start + len(written)
    return -1, -1


def _leaves(value: Any) -> Iterator[str]:
    """The keys, texts and numbers in nested arguments."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from map(str, item)
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, str):
            yield item
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            yield json.dumps(item)


def texts_of(conversation: Conversation) -> Iterator[tuple[int, str, str]]:
    """Turn (-1: tools), name and text of everything that is written besides the contents."""
    for tool in conversation.tools:
        for text in _leaves(tool):
            yield -1, "tools", text
    for i, message in enumerate(conversation.messages):
        yield i, "reasoning", message.reasoning
        for call in message.tool_calls:
            for text in (call.name, call.id, *_leaves(call.arguments)):
                yield i, "tool call", text
        yield i, "name", message.name
        yield i, "tool_call_id", message.tool_call_id


def with_other_answer(conversation: Conversation, content: str) -> Conversation:
    """The conversation with another last answer: a text only."""
    *rest, last = conversation.messages
    return replace(conversation, messages=(*rest, Message(last.role, content)))


def shared_length(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def one_line(error: Exception) -> str:
    """An error's text as one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def template_of(tokenizer: Any) -> str:
    """The template's source; of several named ones, the default. Raises ModelError."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelError(
                f"the tokenizer has several chat templates ({', '.join(sorted(template))}), but none is named default; rename one"
            )
        template = template["default"]
    return str(template)
