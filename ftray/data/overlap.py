"""Which training records give a held-out record away: they hold its question, or most of its word sequences.

Of each record hashes of sequences of NGRAM words are kept: all of a short turn, of a long one some, chosen by winnowing
(Schleimer et al. 2003), so that two texts that share NGRAM + WINDOW - 1 words in a row share a hash, wherever in them
these words stand. Of held-out records both kinds are kept of every turn, to be compared with either. Knows texts and
arrays; nothing of files or tokens.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ftray.chat import Message

NGRAM, WINDOW = 5, 3
SHORT_WORDS = 48  # of a turn with as many words or fewer every sequence is kept
SHARE, MIN_SHARED = 0.6, 3  # of a held-out record's sequences in one training record, and how many at least
COMMON_HELDOUT = 8  # a sequence of more held-out records is a template's
COMMON_SHARE, COMMON_TRAIN = 0.01, 20  # likewise one of more training records than both

Keys = npt.NDArray[np.uint64]
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|(?:(?![぀-ヿ㐀-鿿가-힯])[^\W_])+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Leak:
    """A training record and the held-out record that it gives away. share: of its sequences; 1.0: the question itself."""

    place: int
    of: int
    share: float


def fingerprints(turns: Sequence[Message]) -> Keys:
    """Hashes of a training record's word sequences, system turns left out; sorted, each once."""
    spoken = [words(turn.content) for turn in turns if turn.role != "system"]
    return _union([_grams(turn) if len(turn) <= SHORT_WORDS else _winnow(_grams(turn)) for turn in spoken])


def heldout_fingerprints(turns: Sequence[Message]) -> tuple[Keys, Keys]:
    """Hashes of a held-out record's word sequences: of all, and of those that winnowing chooses."""
    grams = [_grams(words(turn.content)) for turn in turns if turn.role != "system"]
    return _union(grams), _union([_winnow(each) for each in grams])


def _union(parts: list[Keys]) -> Keys:
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)


def words(text: str) -> list[str]:
    """Words, casing folded; each character of a script that has no spaces is one."""
    text = text.casefold()
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text)


def _grams(found: list[str]) -> Keys:
    if len(found) < NGRAM:
        return np.zeros(0, np.uint64)
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found], np.uint64)
    grams = np.zeros(len(found) - NGRAM + 1, np.uint64)
    for k in range(NGRAM):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[k : len(found) - NGRAM + 1 + k]
    grams ^= grams >> np.uint64(29)
    grams = grams * np.uint64(0xBF58476D1CE4E5B9)
    return grams ^ (grams >> np.uint64(32))


def _winnow(grams: Keys) -> Keys:
    if len(grams) <= WINDOW:
        return grams.min(keepdims=True) if len(grams) else grams
    chosen: Keys = np.lib.stride_tricks.sliding_window_view(grams, WINDOW).min(axis=1)
    return chosen


@dataclass
class HeldOut:
    """Fingerprints of the held-out records, to look training records up in.

    hashes: sorted. owners[i]: the records that have hashes[i]. counts: of each record.
    """

    hashes: Keys
    owners: list[list[int]]
    counts: list[int]

    @classmethod
    def of(cls, grams: Sequence[Keys]) -> HeldOut:
        """Sequences of more than COMMON_HELDOUT records are a template's and left out."""
        owners: dict[int, list[int]] = {}
        for place, hashes in enumerate(grams):
            for value in hashes.tolist():
                owners.setdefault(value, []).append(place)
        kept = sorted(value for value, records in owners.items() if len(records) <= COMMON_HELDOUT)
        table = cls(np.array(kept, np.uint64), [owners[value] for value in kept], [0] * len(grams))
        table._count()
        return table

    def hits(self, flat: Keys) -> npt.NDArray[np.int64]:
        """Place in `hashes` of each hash, -1 where it isn't one of them."""
        if not len(self.hashes):
            return np.full(len(flat), -1, np.int64)
        at = np.minimum(np.searchsorted(self.hashes, flat), len(self.hashes) - 1)
        return np.where(self.hashes[at] == flat, at, -1)

    def without_common(self, train_counts: npt.NDArray[np.int64], num_train: int) -> HeldOut:
        """Less the sequences that many training records hold. train_counts: for each of `hashes`."""
        rare = np.flatnonzero(train_counts <= max(COMMON_TRAIN, COMMON_SHARE * num_train))
        owners = [self.owners[i] for i in rare.tolist()]
        table = HeldOut(self.hashes[rare], owners, [0] * len(self.counts))
        table._count()
        return table

    def leaks(self, flat: Keys, offsets: npt.NDArray[np.int64], first: int) -> list[Leak]:
        """Training records that hold at least SHARE of a held-out record's sequences, and MIN_SHARED of them.

        flat: their hashes one after the other, offsets: where each record's begin and the last ends; first: the place of
        the first of these records.
        """
        hits = self.hits(flat)
        found = np.flatnonzero(hits >= 0)
        rows = np.searchsorted(offsets, found, "right") - 1
        shared: Counter[tuple[int, int]] = Counter()
        for row, hit in zip(rows.tolist(), hits[found].tolist(), strict=True):
            for owner in self.owners[hit]:
                shared[row, owner] += 1
        best: dict[int, Leak] = {}
        for (row, owner), number in sorted(shared.items()):
            share = number / self.counts[owner]
            if share >= SHARE and number >= MIN_SHARED and (row not in best or share > best[row].share):
                best[row] = Leak(first + row, owner, round(share, 3))
        return list(best.values())

    def _count(self) -> None:
        for records in self.owners:
            for record in records:
                self.counts[record] += 1


def find_leaks(heldout: Sequence[Keys], train: Sequence[tuple[Keys, npt.NDArray[np.int64], int]]) -> list[Leak]:
    """Training records that give one of `heldout` away. train: pieces, each as the arguments of `HeldOut.leaks`."""
    table = HeldOut.of(heldout)
    counts = np.zeros(len(table.hashes) + 1, np.int64)
    for flat, _, _ in train:
        counts += np.bincount(table.hits(flat) + 1, minlength=len(counts))
    table = table.without_common(counts[1:], sum(len(offsets) - 1 for _, offsets, _ in train))
    return [leak for piece in train for leak in table.leaks(*piece)]
