"""Which training records give a held-out record away: they hold its question, or most of its word sequences.

Of each record hashes of sequences of NGRAM words are kept: all of a short turn, of a long one some, chosen by winnowing
(Schleimer et al. 2003), so that two texts that share NGRAM + WINDOW - 1 words in a row share a hash, wherever in them
these words stand. Of held-out records both kinds are kept of every turn, to be compared with either. Knows texts and
arrays; nothing of files or tokens.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ftray.chat import Message

NGRAM, WINDOW = 5, 3
SHORT_WORDS = 48  # of a turn with as many words or fewer every sequence is kept
SHARE, MIN_SHARED = 0.6, 3  # of a held-out record's sequences in one training record, and how many at least
COMMON_EVAL = 8  # a sequence of more held-out records is a template's
COMMON_SHARE, COMMON_TRAIN = 0.01, 20  # likewise one of more training records than both
PART_HASHES = 1 << 21  # held-out hashes that are looked up at once

Keys = npt.NDArray[np.uint64]
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|(?:(?![぀-ヿ㐀-鿿가-힯])[^\W_])+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Overlap:
    """A training record and the held-out record that it gives away. share: of its sequences; 1.0: the question itself."""

    place: int
    of: int
    share: float


def fingerprints(turns: Sequence[Message]) -> Keys:
    """Hashes of a training record's word sequences, system turns left out; sorted, each once."""
    spoken = [words(turn.content) for turn in turns if turn.role != "system"]
    return _union([_grams(turn) if len(turn) <= SHORT_WORDS else _winnow(_grams(turn)) for turn in spoken])


def eval_fingerprints(turns: Sequence[Message]) -> tuple[Keys, Keys]:
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


@dataclass(frozen=True)
class NgramHashes:
    """Hashes of consecutive records, one record's after the other's; each record's are sorted, each once.

    hashes: uint64 [all]. offsets: int64 [records + 1], where each record's begin, and the end. first: place of the
    first record.
    """

    hashes: Keys
    offsets: npt.NDArray[np.int64]
    first: int

    def between(self, low: int, high: int) -> tuple[Keys, npt.NDArray[np.int64]]:
        """Hashes from low up to, not including, high; and the place of each one's record."""
        some = np.flatnonzero((self.hashes >= np.uint64(low)) & (self.hashes <= np.uint64(high - 1)))
        return self.hashes[some], np.searchsorted(self.offsets, some, "right") - 1 + self.first


def find_leaks(eval_set: Sequence[NgramHashes], train: Sequence[NgramHashes]) -> list[Overlap]:
    """Training records that hold at least SHARE of a held-out record's sequences, and MIN_SHARED of them.

    Of several held-out records the one with the largest share is named. Sequences of many records are a template's and
    count nowhere (COMMON_EVAL, COMMON_TRAIN). Works on ranges of hashes, one after the other, so that memory doesn't
    grow with the held-out set: some 100 MB for PART_HASHES.
    """
    num_eval, num_train = _num_records(eval_set), _num_records(train)
    counts = np.zeros(num_eval, np.int64)
    shared: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    num_parts = -(-sum(len(piece.hashes) for piece in eval_set) // PART_HASHES)
    cuts = [(part << 64) // num_parts for part in range(num_parts + 1)] if num_parts else []
    for low, high in pairwise(cuts):
        table = _EvalNgrams.of([piece.between(low, high) for piece in eval_set])
        table = table.rare((piece.between(low, high)[0] for piece in train), num_train)
        counts += np.bincount(table.owners, minlength=num_eval)
        shared += [table.pairs(*piece.between(low, high), num_eval) for piece in train]
    return _leaks(shared, counts)


def _num_records(pieces: Sequence[NgramHashes]) -> int:
    return sum(len(piece.offsets) - 1 for piece in pieces)


@dataclass(frozen=True)
class _EvalNgrams:
    """Hashes, sorted, and whose they are: those of hashes[i] are owners[starts[i] : starts[i + 1]]."""

    hashes: Keys
    starts: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]

    @classmethod
    def of(cls, parts: Sequence[tuple[Keys, npt.NDArray[np.int64]]]) -> _EvalNgrams:
        """Less the sequences of more than COMMON_EVAL records."""
        flat, owners = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(flat, kind="stable")
        hashes, first, number = np.unique(flat[order], return_index=True, return_counts=True)
        return cls(hashes, np.append(first, len(flat)), owners[order])._only(number <= COMMON_EVAL)

    def _only(self, wanted: npt.NDArray[np.bool_]) -> _EvalNgrams:
        number = np.diff(self.starts)
        starts = np.append(0, np.cumsum(number[wanted]))
        return _EvalNgrams(self.hashes[wanted], starts, self.owners[np.repeat(wanted, number)])

    def hits(self, flat: Keys) -> npt.NDArray[np.int64]:
        """Place in `hashes` of each hash, -1 where it isn't one of them."""
        if not len(self.hashes):
            return np.full(len(flat), -1, np.int64)
        at = np.minimum(np.searchsorted(self.hashes, flat), len(self.hashes) - 1)
        return np.where(self.hashes[at] == flat, at, -1)

    def rare(self, train: Iterable[Keys], num_train: int) -> _EvalNgrams:
        """Less the sequences that many training records hold."""
        seen = np.zeros(len(self.hashes) + 1, np.int64)
        for flat in train:
            seen += np.bincount(self.hits(flat) + 1, minlength=len(seen))
        return self._only(seen[1:] <= max(COMMON_TRAIN, COMMON_SHARE * num_train))

    def pairs(
        self, flat: Keys, places: npt.NDArray[np.int64], num_eval: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(training place * num_eval + held-out place, number of hashes that both have) of each such pair."""
        hits = self.hits(flat)
        found = np.flatnonzero(hits >= 0)
        at = hits[found]
        number = self.starts[at + 1] - self.starts[at]
        within = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        owners = self.owners[np.repeat(self.starts[at], number) + within]
        return np.unique(np.repeat(places[found], number) * num_eval + owners, return_counts=True)


def _leaks(
    shared: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], counts: npt.NDArray[np.int64]
) -> list[Overlap]:
    """Pairs of all ranges of hashes → the best of each training record. counts: sequences of each held-out record."""
    if not shared:
        return []
    codes, back = np.unique(np.concatenate([c for c, _ in shared]), return_inverse=True)
    number = np.bincount(back, np.concatenate([n for _, n in shared]), len(codes)).astype(np.int64)
    places, owners = np.divmod(codes, max(1, len(counts)))
    shares = number / np.maximum(1, counts[owners])
    best: dict[int, Overlap] = {}
    for i in np.flatnonzero((shares >= SHARE) & (number >= MIN_SHARED)).tolist():
        place, share = int(places[i]), round(float(shares[i]), 3)
        if place not in best or share > best[place].share:
            best[place] = Overlap(place, int(owners[i]), share)
    return list(best.values())
