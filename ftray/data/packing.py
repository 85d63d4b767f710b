"""Examples → packed rows. Pure: numpy only; knows no files, tokenizers or Ray.

A row holds whole examples ("documents") one after the other, then padding. Positions restart at 0 in each document
and in the padding, so that a block-diagonal mask or `cu_seqlens` follows from them. Labels are shifted here, once:
labels[t] is the token that the logits at t must predict, or IGNORE_INDEX; a document's last token predicts nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

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


def shift_labels(input_ids: Sequence[int], loss_mask: Sequence[bool]) -> Array:
    """labels[t] = input_ids[t + 1] where loss_mask[t + 1], else IGNORE_INDEX; int32, as long as input_ids."""
    labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int32)
    ids, mask = np.asarray(input_ids, dtype=np.int32), np.asarray(loss_mask, dtype=bool)
    labels[:-1] = np.where(mask[1:], ids[1:], IGNORE_INDEX)
    return labels


def pack_examples(
    examples: Sequence[tuple[Sequence[int], Sequence[bool]]], max_seq_len: int, pad_id: int, packing: bool = True
) -> list[PackedRow]:
    """Packs (input_ids, loss_mask) pairs into rows of max_seq_len; with packing off, one document a row."""
    lengths = [len(ids) for ids, _ in examples]
    rows = best_fit(lengths, max_seq_len) if packing else [[i] for i in range(len(lengths))]
    return [_build_row([examples[i] for i in row], row, max_seq_len, pad_id) for row in rows]


def _build_row(
    documents: Sequence[tuple[Sequence[int], Sequence[bool]]], places: list[int], max_seq_len: int, pad_id: int
) -> PackedRow:
    input_ids = np.full(max_seq_len, pad_id, dtype=np.int32)
    labels = np.full(max_seq_len, IGNORE_INDEX, dtype=np.int32)
    position_ids = np.zeros(max_seq_len, dtype=np.int32)
    at, lengths = 0, []
    for ids, mask in documents:
        end = at + len(ids)
        input_ids[at:end] = ids
        labels[at:end] = shift_labels(ids, mask)
        position_ids[at:end] = np.arange(len(ids))
        lengths.append(len(ids))
        at = end
    position_ids[at:] = np.arange(max_seq_len - at)
    return PackedRow(input_ids, labels, position_ids, lengths, list(places))
