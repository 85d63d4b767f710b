"""Which training records give a held-out record away: they hold its question, or most of its word sequences.

Of each record the hashes of some sequences of NGRAM words are kept, chosen by winnowing (Schleimer et al. 2003): two
records that share NGRAM + WINDOW - 1 words in a row share a hash, wherever in them these words stand. A shorter turn
counts as one sequence. Knows texts and arrays; nothing of files or tokens.
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

NGRAM, WINDOW = 8, 4
MIN_WORDS = 5  # shorter turns ("yes please") give nothing away
SHARE = 0.5  # of a held-out record's hashes in one training record; MIN_SHARED at least, where it has more than that
MIN_SHARED = 2
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
    """Hashes of a conversation's word sequences, system turns left out; sorted, each once."""
    found: set[int] = set()
    for turn in turns:
        if turn.role != "system":
            found.update(_winnow(words(turn.content)))
    return np.array(sorted(found), np.uint64)


def words(text: str) -> list[str]:
    """Words, casing folded; each character of a script that has no spaces is one."""
    text = text.casefold()
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text)


def _winnow(found: list[str]) -> list[int]:
    if len(found) < MIN_WORDS:
        return []
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found], np.uint64)
    size = min(NGRAM, len(found))
    grams = np.zeros(len(found) - size + 1, np.uint64)
    for k in range(size):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[k : len(found) - size + 1 + k]
    grams ^= grams >> np.uint64(29)
    grams = grams * np.uint64(0xBF58476D1CE4E5B9)
    grams ^= grams >> np.uint64(32)
    if len(grams) <= WINDOW:
        return [int(grams.min())]
    return [int(g) for g in np.unique(np.lib.stride_tricks.sliding_window_view(grams, WINDOW).min(axis=1))]


@dataclass
class HeldOut:
    """Fingerprints of the held-out records, to look training records up in.

    hashes: sorted. owners[i]: the records that have hashes[i]. counts: of each record; needed: how many must be shared.
    """

    hashes: Keys
    owners: list[list[int]]
    counts: list[int]
    needed: list[int]

    @classmethod
    def of(cls, grams: Sequence[Keys]) -> HeldOut:
        """Sequences of more than COMMON_HELDOUT records are a template's and left out."""
        owners: dict[int, list[int]] = {}
        for place, hashes in enumerate(grams):
            for value in hashes.tolist():
                owners.setdefault(value, []).append(place)
        needed = [min(len(hashes), MIN_SHARED) for hashes in grams]
        kept = sorted(value for value, records in owners.items() if len(records) <= COMMON_HELDOUT)
        table = cls(np.array(kept, np.uint64), [owners[value] for value in kept], [0] * len(grams), needed)
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
        table = HeldOut(self.hashes[rare], owners, [0] * len(self.counts), self.needed)
        table._count()
        return table

    def leaks(self, flat: Keys, offsets: npt.NDArray[np.int64], first: int) -> list[Leak]:
        """Training records that hold at least SHARE of a held-out record's sequences.

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
            if share >= SHARE and number >= self.needed[owner] and (row not in best or share > best[row].share):
                best[row] = Leak(first + row, owner, round(share, 3))
        return list(best.values())

    def _count(self) -> None:
        for records in self.owners:
            for record in records:
                self.counts[record] += 1
