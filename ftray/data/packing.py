"""Packs examples into sequences of max_seq_len tokens. Pure numpy: no files, tokenizers or Ray.

A packed sequence contains whole examples ("documents") and then padding. Positions restart at 0 in each document and in the
padding, so a block-diagonal mask or `cu_seqlens` follows from them. Labels are shifted here, once: labels[t] is the token that
the logits at t must predict, or IGNORE_INDEX. The last token of a document predicts nothing.
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
class PackedSequence:
    """One training sequence.

    Attributes:
        input_ids: int32 [max_seq_len].
        labels: int32 [max_seq_len], IGNORE_INDEX for tokens that are not trained on.
        position_ids: int32 [max_seq_len].
        lengths: Tokens of each document.
        documents: Indices of the documents in the list that was packed.
    """

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
    def num_trained_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())


def best_fit(lengths: Sequence[int], max_seq_len: int) -> list[list[int]]:
    """Assigns documents to sequences by best-fit decreasing.

    Deterministic: ties go to the earlier document and the earlier sequence.

    Args:
        lengths: Tokens of each document.
        max_seq_len: Tokens of a sequence.

    Returns:
        For each sequence, the ascending indices of its documents.

    Raises:
        ValueError: A length is 0 or above max_seq_len.

    Source:
        Johnson 1973; for language models Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    sequences: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, sequence), sorted: the first that fits is the tightest
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[i]
        if not 0 < length <= max_seq_len:
            raise ValueError(f"document {i} has {length} tokens; a sequence has room for 1 to {max_seq_len}")
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            sequences.append([])
            space, sequence = max_seq_len, len(sequences) - 1
        else:
            space, sequence = free.pop(at)
        sequences[sequence].append(i)
        if space > length:
            bisect.insort(free, (space - length, sequence))
    return [sorted(sequence) for sequence in sequences]


def shift_labels(input_ids: Sequence[int] | Array, loss_mask: Sequence[bool] | npt.NDArray[np.bool_]) -> Array:
    """Returns int32 labels: labels[t] = input_ids[t + 1] if loss_mask[t + 1], else IGNORE_INDEX."""
    labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int32)
    ids, mask = np.asarray(input_ids, dtype=np.int32), np.asarray(loss_mask, dtype=np.bool_)
    np.copyto(labels[:-1], ids[1:], where=mask[1:])
    return labels


Document = tuple[Sequence[int] | Array, Sequence[bool] | npt.NDArray[np.bool_]]


def concatenate(lengths: Sequence[int], max_seq_len: int) -> list[list[tuple[int, int, int]]]:
    """Fills sequences with documents one after another, and cuts a document where a sequence is full.

    Args:
        lengths: Tokens of each document.
        max_seq_len: Tokens of a sequence.

    Returns:
        For each sequence, (document, start, end) of its pieces. All but the last sequence are full.
    """
    sequences: list[list[tuple[int, int, int]]] = []
    space = 0
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            if space == 0:
                sequences.append([])
                space = max_seq_len
            end = min(length, start + space)
            sequences[-1].append((number, start, end))
            space -= end - start
            start = end
    return sequences


def pack_examples(
    examples: Sequence[Document], max_seq_len: int, pad_id: int, packing: bool = True
) -> list[PackedSequence]:
    """Packs examples.

    Args:
        examples: (input_ids, loss_mask) of each document.
        max_seq_len: Tokens of a sequence.
        pad_id: The token id of padding.
        packing: If off, each sequence contains one document.
    """
    lengths = [len(ids) for ids, _ in examples]
    sequences = best_fit(lengths, max_seq_len) if packing else [[i] for i in range(len(lengths))]
    return pack_documents(examples, sequences, max_seq_len, pad_id)


def pack_documents(
    examples: Sequence[Document], sequences: Sequence[Sequence[int]], max_seq_len: int, pad_id: int
) -> list[PackedSequence]:
    """Makes sequences of the documents that are assigned to them.

    Args:
        examples: (input_ids, loss_mask) of each document.
        sequences: For each sequence, the indices of its documents.
        max_seq_len: Tokens of a sequence.
        pad_id: The token id of padding.
    """
    documents = [(np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=np.bool_)) for ids, mask in examples]
    lengths = [len(ids) for ids, _ in documents]
    padding = np.full(max_seq_len, pad_id, dtype=np.int32)
    untrained = np.zeros(max_seq_len, dtype=np.bool_)
    positions = np.arange(max_seq_len, dtype=np.int32)
    packed = []
    for sequence in sequences:
        own_lengths = [lengths[i] for i in sequence]
        ends = list(accumulate(own_lengths))
        space = max_seq_len - ends[-1]
        if space < 0:
            raise ValueError(
                f"document {sequence[0]} has {ends[-1]} tokens; a sequence has room for 1 to {max_seq_len}"
            )
        input_ids = np.concatenate([*(documents[i][0] for i in sequence), padding[:space]])
        mask = np.concatenate([*(documents[i][1] for i in sequence), untrained[:space]])
        mask[ends[:-1]] = False  # nothing predicts the first token of a document, least of all the document before it
        position_ids = np.concatenate([positions[:n] for n in (*own_lengths, space)])
        packed.append(
            PackedSequence(input_ids, shift_labels(input_ids, mask), position_ids, own_lengths, list(sequence))
        )
    return packed
