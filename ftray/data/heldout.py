"""Held-out records as questions with a reference answer, for evaluation by generation."""

from __future__ import annotations

from dataclasses import dataclass

from ftray.chat import ChatFormat
from ftray.data.chunks import Stream
from ftray.data.clean import Example, read_examples
from ftray.data.index import Index
from ftray.data.order import chunk_order, key


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer. prompt_ids: with the generation prompt. text: the last question."""

    prompt_ids: list[int]
    text: str
    reference: str


def pick_questions(index: Index, stream: Stream, chat: ChatFormat, number: int) -> list[Question]:
    """Up to `number` questions, chunk by chunk and in each by a fixed hash order; plain-text records have none."""
    facts = [f for f in index.facts if f.num_records]
    picked: list[Question] = []
    for place in chunk_order([(f.chunk.path, f.chunk.start) for f in facts], seed=0, epoch=0, source=0):
        chunk = facts[place].chunk
        examples = [e for e in read_examples(chunk, chat, stream.rules(chunk.source)) if isinstance(e, Example)]
        for item in sorted(examples, key=lambda e: key(chunk.path, e.position)):
            if item.messages is None or item.messages[-1].role != "assistant":
                continue
            *asked, answer = item.messages
            picked.append(Question(chat.encode_prompt(asked), asked[-1].content, answer.content))
            if len(picked) == number:
                return picked
    return picked
