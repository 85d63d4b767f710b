"""What becomes of a record that is longer than a packed sequence: `data.too_long`.

Conversations are cut between turns only, after an answer that is trained on, so that no answer is trained on in part. Plain
texts are cut between tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    cutter = _Cutter(content, chat, max_seq_len)
    context = next(cutter.contexts(0, 0), ()) if cutter.answers else ()
    last = cutter.longest(context, 0)
    part = None if last is None else cutter.part(context, 0, last)
    return [] if part is None else [part]


def split(content: Conversation | str, encoded: Encoded, chat: ChatFormat, max_seq_len: int) -> list[RecordPart]:
    """A record in parts.

    Each later part of a conversation begins with its system turn and a user turn; other earlier turns are no longer its context.
    Parts begin at a user turn where they can. Where the turns after one question do not fit, the question is repeated, and so is
    the call before a tool's result, but each call is trained on once. An answer that does not fit with its question is left out.

    Args:
        content: The conversation or the text.
        encoded: Its ids and mask.
        chat: Encodes the parts.
        max_seq_len: The most tokens of a part.

    Returns:
        The parts, or none if no question with its answer fits.
    """
    if isinstance(content, str):
        return _split_text(encoded, chat, max_seq_len)
    cutter = _Cutter(content, chat, max_seq_len)
    parts: list[RecordPart] = []
    number = end = 0  # the next answer, and the first turn that is in no part yet
    while number < len(cutter.answers):
        for context in cutter.contexts(end, number):
            fitting = cutter.longest(context, number)
            last = number if fitting is None else cutter.at_question(number, fitting)
            part = None if fitting is None else cutter.part(context, number, last)
            if part is not None:
                parts.append(part)
                break
        else:
            last = number  # it is lost
        number, end = last + 1, cutter.answers[last] + 1
    return parts


class _Cutter:
    """Cuts a conversation between turns.

    Attributes:
        answers: The numbers of the turns that are trained on.
    """

    def __init__(self, conversation: Conversation, chat: ChatFormat, max_seq_len: int) -> None:
        self._conversation, self._chat, self._max_seq_len = conversation, chat, max_seq_len
        messages = conversation.messages
        others = (i for i, m in enumerate(messages) if m.role not in ("system", "developer"))
        self._head = next(others, len(messages))
        self._users = [i for i, m in enumerate(messages) if m.role == "user"]
        self.answers = chat.trained_turns(conversation)
        self._trained = frozenset(self.answers)

    def contexts(self, end: int, number: int) -> Iterator[tuple[int, ...]]:
        """The turns that may precede an answer in a new part, apart from the system turn; the best first.

        Args:
            end: The first turn that is in no part yet.
            number: The number of the answer.
        """
        answer, messages = self.answers[number], self._conversation.messages
        if end == 0:
            yield tuple(range(self._head, answer))
        users = [user for user in self._users if end <= user < answer]
        for user in dict.fromkeys((*users[:1], *users[-1:])):
            yield tuple(range(user, answer))
        question = max((user for user in self._users if user < answer), default=None)
        if question is None:
            return
        resume = answer
        while resume > question + 1 and messages[resume - 1].role == "tool":
            resume -= 1
        if resume < answer:
            resume -= 1  # the call whose results these are
        yield (question, *range(max(resume, question + 1), answer))

    def longest(self, context: tuple[int, ...], number: int) -> int | None:
        """The last answer up to which a part fits that begins with this context and answer. None: not even this one fits."""
        numbers = range(number, len(self.answers))
        num_fitting = bisect_right(numbers, 0, key=lambda last: int(self.part(context, number, last) is None))
        return number + num_fitting - 1 if num_fitting else None  # longer parts have more tokens

    def at_question(self, number: int, last: int) -> int:
        """The last answer in [number, last] that a question or the end follows; `last` if there is none."""
        for each in range(last, number - 1, -1):
            later = self.answers[each + 1] if each + 1 < len(self.answers) else None
            if later is None or any(self.answers[each] < user < later for user in self._users):
                return each
        return last

    def part(self, context: tuple[int, ...], number: int, last: int) -> RecordPart | None:
        """The part with the system turn, the context, and the turns from one answer to another. None: it does not fit."""
        messages, first = self._conversation.messages, self.answers[number]
        before = [replace(messages[i], train=False) if i in self._trained else messages[i] for i in context]
        turns = (*messages[: self._head], *before, *messages[first : self.answers[last] + 1])
        piece = Conversation(turns, self._conversation.tools)
        (encoded,) = self._chat.encode_examples([piece])
        if isinstance(encoded, DataError) or encoded.longest > self._max_seq_len:
            return None
        return RecordPart(piece, encoded)


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
