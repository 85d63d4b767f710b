"""Contamination: training records that contain the question of an eval record, or most of its n-grams.

Each record keeps hashes of its n-grams of NGRAM words: all n-grams of a short turn, and a subset of a long turn, selected by
winnowing (Schleimer et al. 2003). Two texts that share NGRAM + WINDOW - 1 consecutive words therefore share a hash, at any
position. Eval records keep both kinds for every turn, to be compared with either. Works on texts and arrays only.
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
SHORT_WORDS = 48  # turns with at most this many words keep every n-gram
SHARE, MIN_SHARED = 0.6, 3  # share of an eval record's n-grams in one training record, and their minimum number
COMMON_EVAL = 8  # an n-gram in more eval records belongs to a template
COMMON_SHARE, COMMON_TRAIN = 0.01, 20  # likewise an n-gram in more training records than both limits
PART_HASHES = 1 << 21  # eval hashes per lookup table

Keys = npt.NDArray[np.uint64]
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|(?:(?![぀-ヿ㐀-鿿가-힯])[^\W_])+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Leak:
    """A training record that contains most of an eval record.

    Attributes:
        place: The index of the training record.
        of: The index of the eval record.
        share: Share of the eval record's n-grams; 1.0 if the questions are equal.
    """

    place: int
    of: int
    share: float


def fingerprints(turns: Sequence[Message]) -> Keys:
    """The sorted distinct hashes of a training record's n-grams, without system turns."""
    spoken = [words(turn.text) for turn in turns if turn.role != "system"]
    return _union([_grams(turn) if len(turn) <= SHORT_WORDS else _winnow(_grams(turn)) for turn in spoken])


def eval_fingerprints(turns: Sequence[Message]) -> tuple[Keys, Keys]:
    """The hashes of an eval record's n-grams: of all n-grams, and of those selected by winnowing."""
    grams = [_grams(words(turn.text)) for turn in turns if turn.role != "system"]
    return _union(grams), _union([_winnow(each) for each in grams])


def _union(parts: list[Keys]) -> Keys:
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)


def words(text: str) -> list[str]:
    """The case-folded words. In scripts without spaces each character is a word."""
    text = text.casefold()
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text)


def _grams(words_: list[str]) -> Keys:
    if len(words_) < NGRAM:
        return np.zeros(0, np.uint64)
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words_], np.uint64)
    grams = np.zeros(len(words_) - NGRAM + 1, np.uint64)
    for k in range(NGRAM):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[k : len(words_) - NGRAM + 1 + k]
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
    """N-gram hashes of consecutive records, concatenated; sorted and distinct within each record.

    Attributes:
        hashes: uint64 [all].
        offsets: int64 [records + 1], the start of each record's hashes, and the end.
        first: The index of the first record.
    """

    hashes: Keys
    offsets: npt.NDArray[np.int64]
    first: int

    def between(self, low: int, high: int) -> tuple[Keys, npt.NDArray[np.int64]]:
        """The hashes in [low, high), and the index of the record of each."""
        some = np.flatnonzero((self.hashes >= np.uint64(low)) & (self.hashes <= np.uint64(high - 1)))
        return self.hashes[some], np.searchsorted(self.offsets, some, "right") - 1 + self.first


def find_leaks(eval_set: Sequence[NgramHashes], train: Sequence[NgramHashes]) -> list[Leak]:
    """Finds training records that contain at least SHARE of an eval record's n-grams, and at least MIN_SHARED of them.

    If several eval records match, the one with the largest share is returned. N-grams of many records belong to a template and
    do not count (COMMON_EVAL, COMMON_TRAIN). The function processes ranges of hashes one after the other, so that memory does
    not grow with the eval set: about 100 MB for PART_HASHES.

    Args:
        eval_set: Hashes of all eval records.
        train: Hashes of all training records.

    Returns:
        At most one leak per training record.
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
    """Sorted hashes and the eval records that contain them: hashes[i] is in owners[starts[i] : starts[i + 1]]."""

    hashes: Keys
    starts: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]

    @classmethod
    def of(cls, parts: Sequence[tuple[Keys, npt.NDArray[np.int64]]]) -> _EvalNgrams:
        """Builds the table without the n-grams of more than COMMON_EVAL records."""
        flat, owners = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(flat, kind="stable")
        hashes, first, number = np.unique(flat[order], return_index=True, return_counts=True)
        return cls(hashes, np.append(first, len(flat)), owners[order])._only(number <= COMMON_EVAL)

    def _only(self, wanted: npt.NDArray[np.bool_]) -> _EvalNgrams:
        number = np.diff(self.starts)
        starts = np.append(0, np.cumsum(number[wanted]))
        return _EvalNgrams(self.hashes[wanted], starts, self.owners[np.repeat(wanted, number)])

    def hits(self, flat: Keys) -> npt.NDArray[np.int64]:
        """The index of each hash in `hashes`, or -1 if it is not there."""
        if not len(self.hashes):
            return np.full(len(flat), -1, np.int64)
        at = np.minimum(np.searchsorted(self.hashes, flat), len(self.hashes) - 1)
        return np.where(self.hashes[at] == flat, at, -1)

    def rare(self, train: Iterable[Keys], num_train: int) -> _EvalNgrams:
        """The table without the n-grams that many training records contain."""
        counts = np.zeros(len(self.hashes) + 1, np.int64)
        for flat in train:
            counts += np.bincount(self.hits(flat) + 1, minlength=len(counts))
        return self._only(counts[1:] <= max(COMMON_TRAIN, COMMON_SHARE * num_train))

    def pairs(
        self, flat: Keys, places: npt.NDArray[np.int64], num_eval: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(training index * num_eval + eval index, number of shared hashes) of each pair with a shared hash."""
        hits = self.hits(flat)
        matched = np.flatnonzero(hits >= 0)
        at = hits[matched]
        number = self.starts[at + 1] - self.starts[at]
        within = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        owners = self.owners[np.repeat(self.starts[at], number) + within]
        return np.unique(np.repeat(places[matched], number) * num_eval + owners, return_counts=True)


def _leaks(
    shared: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], counts: npt.NDArray[np.int64]
) -> list[Leak]:
    """The best leak of each training record. counts: int64 [eval records], the n-grams of each eval record."""
    if not shared:
        return []
    codes, back = np.unique(np.concatenate([c for c, _ in shared]), return_inverse=True)
    number = np.bincount(back, np.concatenate([n for _, n in shared]), len(codes)).astype(np.int64)
    places, owners = np.divmod(codes, max(1, len(counts)))
    shares = number / np.maximum(1, counts[owners])
    best: dict[int, Leak] = {}
    for i in np.flatnonzero((shares >= SHARE) & (number >= MIN_SHARED)).tolist():
        place, share = int(places[i]), round(float(shares[i]), 3)
        if place not in best or share > best[place].share:
            best[place] = Leak(place, int(owners[i]), share)
    return list(best.values())
