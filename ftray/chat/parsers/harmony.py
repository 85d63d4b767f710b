"""Answers of gpt-oss: messages in channels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ftray.chat.parsers.answer import AnswerOutput
from ftray.chat.parsers.reader import Reading, TextReader

RECIPIENT = re.compile(r"\bto=([^\s<]+)")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


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
                if text := "".join(header).strip():  # not in the format: all of it is content
                    out.content(text)
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
            if (yield from reader.until(ENDS, emit)) is None:
                return
