"""Answers of gpt-oss: messages in channels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ftray.chat.parsers.answer import AnswerOutput
from ftray.chat.parsers.reader import Emit, Reading, TextReader

RECIPIENT = re.compile(r"\bto=([^\s<]+)")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
CUT_HEADER = re.compile(r"<\|start\|>|<\|channel\|>|<\|constrain\|>|^to=functions\.")
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


class _Body:
    """Passes the text of a message on. is_blank: whether all of it so far is white space."""

    def __init__(self, emit: Emit) -> None:
        self._emit, self.is_blank = emit, True

    def __call__(self, text: str) -> None:
        self.is_blank = self.is_blank and not text.strip()
        self._emit(text)


@dataclass(frozen=True)
class Harmony:
    """Messages `<|channel|>analysis<|message|>…<|end|><|start|>assistant…`: analysis is reasoning, final is content.

    A message to `functions.f` is a call, whose recipient stands before or after the channel. The prompt ends with
    `<|start|>assistant`, so the first message begins with its header.

    Source: OpenAI's harmony response format.
    """

    name: str = "harmony"
    reasoning: tuple[str, str] = ("<|channel|>analysis<|message|>", "<|end|>")

    def markers(self, *, reads_calls: bool) -> tuple[str, ...]:  # noqa: ARG002 - channels are in every answer
        return ("<|channel|>", "<|message|>", "<|constrain|>", *ENDS)

    def read(self, reader: TextReader, out: AnswerOutput, *, reads_calls: bool, in_reasoning: bool) -> Reading[None]:  # noqa: ARG002
        has_reasoning = False
        while True:
            header: list[str] = []
            if (yield from reader.until(("<|message|>",), header.append)) is None:
                if text := CUT_HEADER.split("".join(header).strip(), maxsplit=1)[0].strip():
                    out.content(text)  # not in the format: what is no header is content
                return
            head = "".join(header)
            channel = CHANNEL.search(head)
            recipient = RECIPIENT.search(head)
            emit = out.content
            if recipient is not None and reads_calls:
                out.begin_call(recipient[1].removeprefix("functions."))
                emit = out.arguments
            elif channel is not None and channel[1] == "analysis":
                if has_reasoning:
                    out.reasoning("\n")
                has_reasoning, emit = True, out.reasoning
            body = _Body(emit)
            if (yield from reader.until(ENDS, body)) is None:
                return
            if emit == out.arguments and body.is_blank:
                out.arguments("{}")
