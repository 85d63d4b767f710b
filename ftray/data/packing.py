"""Examples → packed rows. Pure: numpy only; knows no files, tokenizers or Ray.

A row holds whole examples ("documents") one after the other, then padding. Positions restart at 0 in each document
and in the padding, so that a block-diagonal mask or `cu_seqlens` follows from them. Labels are shifted here, once:
labels[t] is the token that the logits at t must predict, or IGNORE_INDEX; a document's last token predicts nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100

Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PackedRow:
    """input_ids, labels, position_ids: int32 [max_seq_len]. lengths: tokens of each document; documents: their places."""

    input_ids: Array
    labels: Array
    position_ids: Array
    lengths: list[int]
    documents: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    @property
    def num_supervised(self) -> int:
        """Tokens under the loss."""
        return int((self.labels != IGNORE_INDEX).sum())


def best_fit(lengths: Sequence[int], max_seq_len: int) -> list[list[int]]:
    """Places whole documents into rows by best-fit decreasing (Johnson 1973; for packing: Ding et al. 2024).

    lengths: tokens of each document. Returns, for each row, the places of its documents in `lengths`, ascending.
    Deterministic: ties go to the earlier document and the earlier row. Raises ValueError for a length of 0 or above
    max_seq_len.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted: the first that fits is the tightest
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[i]
        if not 0 < length <= max_seq_len:
            raise ValueError(f"document {i} has {length} tokens; a row holds 1 to {max_seq_len}")
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            rows.append([])
            room, row = max_seq_len, len(rows) - 1
        else:
            room, row = free.pop(at)
        rows[row].append(i)
        if room > length:
            bisect.insort(free, (room - length, row))
    return [sorted(row) for row in rows]


def shift_labels(input_ids: Sequence[int] | Array, loss_mask: Sequence[bool] | npt.NDArray[np.bool_]) -> Array:
    """labels[t] = input_ids[t + 1] where loss_mask[t + 1], else IGNORE_INDEX; int32, as long as input_ids."""
    labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int32)
    ids, mask = np.asarray(input_ids, dtype=np.int32), np.asarray(loss_mask, dtype=np.bool_)
    np.copyto(labels[:-1], ids[1:], where=mask[1:])
    return labels


def pack_examples(
    examples: Sequence[tuple[Sequence[int] | Array, Sequence[bool] | npt.NDArray[np.bool_]]],
    max_seq_len: int,
    pad_id: int,
    packing: bool = True,
) -> list[PackedRow]:
    """Packs (input_ids, loss_mask) pairs into rows of max_seq_len; with packing off, one document a row."""
    documents = [(np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=np.bool_)) for ids, mask in examples]
    lengths = [len(ids) for ids, _ in documents]
    rows = best_fit(lengths, max_seq_len) if packing else [[i] for i in range(len(lengths))]
    padding = np.full(max_seq_len, pad_id, dtype=np.int32)
    unlearned = np.zeros(max_seq_len, dtype=np.bool_)
    positions = np.arange(max_seq_len, dtype=np.int32)
    packed = []
    for row in rows:
        mine = [lengths[i] for i in row]
        ends = list(accumulate(mine))
        room = max_seq_len - ends[-1]
        if room < 0:
            raise ValueError(f"document {row[0]} has {ends[-1]} tokens; a row holds 1 to {max_seq_len}")
        input_ids = np.concatenate([*(documents[i][0] for i in row), padding[:room]])
        mask = np.concatenate([*(documents[i][1] for i in row), unlearned[:room]])
        mask[ends[:-1]] = False  # a document's first token is predicted by nothing, least of all by its neighbour
        position_ids = np.concatenate([positions[:n] for n in (*mine, room)])
        packed.append(PackedRow(input_ids, shift_labels(input_ids, mask), position_ids, mine, row))
    return packed
