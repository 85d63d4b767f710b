"""The text that a model has to generate for an answer, after the prompt that the endpoint sends.

For most templates that is the rendered conversation without its prompt. Three habits of templates need more:

- The prompt ends inside the reasoning (`<think>`), but the rendered answer has no reasoning. The model has to write the
  reasoning, and close it.
- Earlier turns look different once the answer is there, because their reasoning is left out. The answer begins where the last
  turn begins, not where the prompt ends.
- Nothing ends an answer but the token that begins the next turn (`<|user|>`). That token ends the answer, and stops the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from ftray.chat.messages import Conversation, Message
from ftray.chat.renderer import TemplateRenderer, shared_length, with_other_answer
from ftray.chat.turn_shape import ANSWER, CALLING, CALLING_TWICE, LONG_ID, OTHER_TOOL, QUESTION, RESULT, TOOL
from ftray.errors import DataError

OPENING = re.compile(r"<([A-Za-z_]+)>\s*$")  # at the end of a prompt: reasoning begins
ANSWERED = Conversation((QUESTION, Message("assistant", ANSWER)))
CALLED = Conversation((QUESTION, CALLING))
CALLED_TWICE = Conversation((QUESTION, CALLING_TWICE))


@dataclass(frozen=True)
class AnswerText:
    """An answer's text.

    Attributes:
        text: All that the template writes after the prompt.
        body: Where its end token begins.
        end: Where its end token ends. The template's text after that is not trained on.
        marks: (start, end) of the template's generation marks in it.
        adds_reasoning: Whether it begins with the reasoning that the prompt opens and the template leaves out.
    """

    text: str
    body: int
    end: int
    marks: tuple[tuple[int, int], ...]
    adds_reasoning: bool


@dataclass(frozen=True)
class Ending:
    """How the template ends an answer.

    Attributes:
        token: The last special token that it writes after an answer whether or not another turn follows; empty if there is none.
        next_token: Of an answer without an end token: the special token that begins the next turn, after a text.
        next_token_after_calls: Likewise, after tool calls.
    """

    token: str = ""
    next_token: str = ""
    next_token_after_calls: str = ""


class AnswerReader:
    """Finds answers in the texts of a template.

    Args:
        renderer: Renders with the template.
        specials: The special tokens of the tokenizer.
        ending: How the template ends an answer, if that is known.
    """

    def __init__(self, renderer: TemplateRenderer, specials: Collection[str], ending: Ending | None = None) -> None:
        self._renderer, self._ending = renderer, ending
        pattern = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
        self._special = re.compile(pattern) if pattern else None

    @property
    def ending(self) -> Ending:
        """How the template ends an answer, from probes."""
        if self._ending is None:
            self._ending = self._find_ending()
        return self._ending

    def _find_ending(self) -> Ending:
        alone = self._renderer.render(ANSWERED).text
        followed = self._followed(Message("user", RESULT), ANSWERED)
        end = alone.rfind(ANSWER) + len(ANSWER)
        if last := self._last_special(alone[end : shared_length(alone, followed)]):
            return Ending(last)
        if self._last_special(alone[end:]):
            return Ending()
        return Ending("", self._next_token(alone, followed), self._next_token_after_calls())

    def read(self, conversation: Conversation, prompt: str) -> AnswerText:
        """The last message of a conversation, as the text after a prompt.

        Args:
            conversation: Ends with an answer.
            prompt: The text for the messages before it, with the generation prompt.

        Raises:
            DataError: The template cannot render it, or renders it after another prompt.
        """
        rendered = self._renderer.render(conversation)
        text, (lead, start) = rendered.text, self._start(conversation, rendered.text, prompt)
        answer = lead + text[start:]
        shift = len(lead) - start
        marks = [(max(a + shift, len(lead)), b + shift) for a, b in rendered.marks if b > start]
        if lead and marks:
            marks.insert(0, (0, len(lead)))
        token = self.ending.token
        if token not in answer:
            token = ""
        if (
            next_token := self.ending.next_token_after_calls
            if conversation.messages[-1].tool_calls
            else self.ending.next_token
        ):
            answer, token = answer.rstrip().removesuffix(next_token) + next_token, next_token
        token = token or self._last_special(answer)
        body = answer.rfind(token) if token else len(answer)
        return AnswerText(answer, body, body + len(token), tuple(marks), bool(lead))

    def _start(self, conversation: Conversation, text: str, prompt: str) -> tuple[str, int]:
        """What the model has to write before the rest of the rendered text, and where this rest begins."""
        if text.startswith(prompt):
            return "", len(prompt)
        last = len(conversation.messages) - 1
        before = self._renderer.render(conversation.until(last)).text
        head = prompt[shared_length(prompt, before) :]
        low, high = self._last_turn(conversation, text)
        behind = self._end_of_content(conversation, text)
        at = text.rfind(head, behind, high) if head.strip() else -1
        if at >= 0 and at + len(head) > low:
            return "", at + len(head)
        opening = OPENING.search(head)
        at = text.rfind(head[: opening.start()], behind, high) if opening and opening.start() else -1
        if opening is None or at < 0 or at + opening.start() <= low:
            if head.rstrip().endswith("</think>") and conversation.messages[last].reasoning:
                raise DataError(
                    f"turn {last} has reasoning, but the prompt of this chat template closes the reasoning; remove it"
                )
            raise DataError(
                f"the chat template renders turn {last} after another prompt than the endpoint would receive; use a base with "
                "another template"
            )
        start, tag = at + opening.start(), f"<{opening[1]}>"
        body = text[start:].lstrip()
        if body.startswith(tag):  # opened without the white space that follows in the prompt
            return "", len(text) - len(body) + len(tag)
        return _reasoning(conversation.messages[last], opening[1], opening[0].endswith("\n")), start

    def _last_turn(self, conversation: Conversation, text: str) -> tuple[int, int]:
        """The last turn begins after the first of these places, and its prompt ends before the second.

        A turn of another role, or another answer, would make a difference from there on.
        """
        *messages, _ = conversation.messages
        user = self._followed(Message("user", OTHER_TOOL), Conversation(tuple(messages), conversation.tools))
        other = self._renderer.render(with_other_answer(conversation, OTHER_TOOL)).text
        return shared_length(text, user), shared_length(text, other)

    def _end_of_content(self, conversation: Conversation, text: str) -> int:
        """The last answer's prompt ends after this place: where the content of the message before it ends, or earlier.

        Another content changes the text up to there only. Earlier turns may hold the same prompt, also where the template
        rewrites them for another last turn, so that `_last_turn` does not tell them apart.
        """
        *head, before, last = conversation.messages
        low = 0
        for content in (OTHER_TOOL, ANSWER + "."):  # one of them ends otherwise than the content
            other = Message(before.role, content, tool_call_id=before.tool_call_id, name=before.name)
            try:
                changed = self._renderer.render(replace(conversation, messages=(*head, other, last))).text
            except DataError:
                continue
            low = max(low, len(text) - shared_length(text[::-1], changed[::-1]))
        return low

    def _last_special(self, text: str) -> str:
        matches = self._special.findall(text) if self._special else []
        return str(matches[-1]) if matches else ""

    def _followed(self, message: Message, conversation: Conversation) -> str:
        """The text with another message at the end; empty if the template refuses it."""
        try:
            return self._renderer.render(Conversation((*conversation.messages, message), conversation.tools)).text
        except DataError:
            return ""

    def _next_token(self, alone: str, followed: str) -> str:
        body = alone.rstrip()
        if self._special is None or not followed.startswith(body):
            return ""
        match = self._special.match(followed[len(body) :].lstrip())
        return match[0] if match else ""

    def _next_token_after_calls(self) -> str:
        if not self._renderer.shape.writes_calls:
            return ""
        result = Message("tool", RESULT, tool_call_id=LONG_ID, name=TOOL)
        return self._next_token(self._renderer.render(CALLED).text, self._followed(result, CALLED))


def _reasoning(message: Message, tag: str, follows_line: bool) -> str:
    """The reasoning and its closing tag, for a template whose prompt opens it and which leaves it out of answers."""
    if inline := re.match(rf"\s*<{tag}>\n?(.*</{tag}>)", message.content, re.DOTALL):
        return inline[1]
    return f"{'' if follows_line else chr(10)}{message.reasoning.strip()}\n</{tag}>\n\n"
