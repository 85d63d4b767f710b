"""What becomes of a record that is longer than a packed sequence: `data.too_long`.

Conversations are cut between turns only, after an answer that is trained on, so that no answer is trained on in part. Plain
texts are cut between tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ftray.chat import ChatFormat, Conversation, Encoded
from ftray.errors import DataError


@dataclass(frozen=True)
class RecordPart:
    """A part of a record that fits into a sequence.

    Attributes:
        content: The conversation or the text.
        encoded: Its ids and mask.
        is_cut: Whether it is a text that does not end with the end token.
    """

    content: Conversation | str
    encoded: Encoded
    is_cut: bool = False


def truncate(content: Conversation | str, encoded: Encoded, chat: ChatFormat, max_seq_len: int) -> list[RecordPart]:
    """The beginning of a record: of a conversation, the turns up to the last answer that fits; of a text, its first tokens.

    Args:
        content: The conversation or the text.
        encoded: Its ids and mask.
        chat: Encodes the part.
        max_seq_len: The most tokens of the part.

    Returns:
        One part, or none if not even the first answer fits.
    """
    if isinstance(content, str):
        return [_text_part(encoded, 0, max_seq_len - len(chat.text_prefix), chat)]
    part = _longest(content, 0, 0, chat, max_seq_len)
    return [] if part is None else [part[0]]


def split(content: Conversation | str, encoded: Encoded, chat: ChatFormat, max_seq_len: int) -> list[RecordPart]:
    """A record in parts. Each part of a conversation begins with its system turn; earlier turns are no longer its context.

    Args:
        content: The conversation or the text.
        encoded: Its ids and mask.
        chat: Encodes the parts.
        max_seq_len: The most tokens of a part.

    Returns:
        The parts, or none if a question with its answer does not fit.
    """
    if isinstance(content, str):
        return _split_text(encoded, chat, max_seq_len)
    messages = content.messages
    head = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
    parts: list[RecordPart] = []
    start, last = head, max(_answers(content, chat), default=0)
    while start < last:
        part = _longest(content, head, start, chat, max_seq_len)
        if part is None:
            return []
        parts.append(part[0])
        end = part[1]
        question = next((i for i in range(end, len(messages)) if messages[i].role == "user"), len(messages))
        has_answer_before = any(end < answer <= question for answer in _answers(content, chat))
        start = end if has_answer_before else question
    return parts


def _answers(conversation: Conversation, chat: ChatFormat) -> list[int]:
    """For each answer that is trained on, the number of the message after it."""
    return [i + 1 for i in chat.trained_turns(conversation)]


def _longest(
    conversation: Conversation, head: int, start: int, chat: ChatFormat, max_seq_len: int
) -> tuple[RecordPart, int] | None:
    """The longest part with messages [0, head) and [start, end) that fits, and its end. None: none does."""
    messages = conversation.messages

    def part(end: int) -> RecordPart | None:
        piece = Conversation((*messages[:head], *messages[max(head, start) : end]), conversation.tools)
        (encoded,) = chat.encode_examples([piece])
        if isinstance(encoded, DataError) or encoded.longest > max_seq_len:
            return None
        return RecordPart(piece, encoded)

    ends = [end for end in _answers(conversation, chat) if end > start]
    number = bisect_right(ends, 0, key=lambda end: int(part(end) is None))  # longer parts have more tokens
    found = part(ends[number - 1]) if number else None
    return None if found is None else (found, ends[number - 1])


def _split_text(encoded: Encoded, chat: ChatFormat, max_seq_len: int) -> list[RecordPart]:
    room = max_seq_len - len(chat.text_prefix)
    size = len(encoded.input_ids) - len(chat.text_prefix)
    edges = [*range(0, size, room), size]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        edges[-2] -= 1  # a single token would predict nothing
    return [_text_part(encoded, a, b, chat) for a, b in pairwise(edges)]


def _text_part(encoded: Encoded, start: int, end: int, chat: ChatFormat) -> RecordPart:
    """Tokens [start, end) of a text, counted after the prefix, with the prefix in front of them."""
    prefix = np.asarray(chat.text_prefix, np.int32)
    body = np.asarray(encoded.input_ids, np.int32)[len(prefix) :]
    ids = np.concatenate([prefix, body[start:end]])
    is_cut = end < len(body)
    text = chat.decode(body[start:end] if is_cut else body[start : end - 1], before=prefix)
    return RecordPart(text, Encoded(ids, np.arange(len(ids)) >= len(prefix)), is_cut)


def num_trained(encoded: Encoded) -> int:
    """The number of its tokens that are trained on."""
    return int(np.count_nonzero(np.asarray(encoded.loss_mask)[1:]))
