"""Duplicates and near-duplicates: record keys, MinHash signatures, and the search for pairs among millions of records.

Two records are duplicates if their tools, their turns and the turns that are trained on are equal, except for white space. They
are near-duplicates if the Jaccard similarity of their five-character shingles (letters and digits, case-folded, without system
turns) is at least SIMILARITY, estimated from MinHash signatures (Broder 1997; datasketch). Text that most records share, such as
a template or an instruction, is left out of the estimate. Works on conversations and arrays only.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ftray.chat import Message

SHINGLE = 5  # characters
NUM_PERM = 128  # slots of a signature, 16 bits each: 256 bytes a record
BAND = 4  # two records are compared if a band of this many slots is equal: 64 bits, one number
SIMILARITY = 0.7
KEPT = 8  # similar records that are remembered per record: the earliest
ROUNDS = 6  # leaders tried in a group of records that share a band
PIECE = 4096  # shingles hashed, or pairs compared, at once
MIN_SLOTS = 12  # slots that a comparison needs besides common ones
COMMON_SHARE, COMMON_RECORDS = 0.1, 20  # a slot value in more records than both limits belongs to a template

Keys = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class RecordKeys:
    """64-bit hashes of a record.

    Attributes:
        whole: Of the whole conversation.
        prompt: Of the turns before the last answer; 0 if there are none.
        answer: Of the last answer.
    """

    whole: int
    prompt: int
    answer: int


class DuplicatePair(NamedTuple):
    """A record that repeats an earlier one, by the indexes of both. The similarity of equal records is 1.0."""

    place: int
    of: int
    similarity: float


@dataclass(frozen=True)
class DuplicatePairs:
    """Many `DuplicatePair`s, sorted by `places`: int64, int64, float64 [pairs]."""

    places: npt.NDArray[np.int64]
    of: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[DuplicatePair]:
        return map(DuplicatePair, self.places.tolist(), self.of.tolist(), self.similarity.tolist())

    def runs(self) -> list[tuple[int, int]]:
        """[start, end) of the pairs of each record."""
        cuts = np.flatnonzero(np.r_[True, self.places[1:] != self.places[:-1], True]) if len(self) else np.zeros(1, int)
        return list(pairwise(cuts.tolist()))

    @classmethod
    def joined(cls, parts: Sequence[DuplicatePairs]) -> DuplicatePairs:
        """The sorted distinct pairs; for each record those with the KEPT earliest other records."""
        places, of, similarity = (
            np.concatenate(arrays) for arrays in zip(*((p.places, p.of, p.similarity) for p in parts), strict=True)
        )
        order = np.lexsort((of, places))
        places, of, similarity = places[order], of[order], similarity[order]
        if not len(places):
            return NO_PAIRS
        new = np.r_[True, (places[1:] != places[:-1]) | (of[1:] != of[:-1])]
        places, of, similarity = places[new], of[new], similarity[new]
        first = np.flatnonzero(np.r_[True, places[1:] != places[:-1]])
        rank = np.arange(len(places)) - np.repeat(first, np.diff(np.r_[first, len(places)]))
        kept = rank < KEPT
        return cls(places[kept], of[kept], similarity[kept])


NO_PAIRS = DuplicatePairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def record_keys(turns: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> RecordKeys:
    """The keys of a conversation. Plain text is one assistant turn.

    The tools belong to its prompt. Whether a turn is trained on matters for the whole conversation only.
    """
    parts = [f"{turn.role}\x1f{' '.join(turn.text.split())}" for turn in turns]
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    before = [f"tools\x1f{json.dumps(tools, sort_keys=True)}"] if tools else []
    untrained = [f"untrained\x1f{i}" for i, turn in enumerate(turns) if not turn.train]
    prompt = _hash("\x1e".join([*before, *parts[:last]])) if last else 0
    return RecordKeys(_hash("\x1e".join([*before, *parts, *untrained])), prompt, _hash(parts[last]))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def spoken_text(turns: Sequence[Message]) -> str:
    """The text for the comparison of near-duplicates: case-folded words without punctuation and system turns."""
    raw = " ".join(turn.text for turn in turns if turn.role != "system").casefold()
    return " ".join(re.findall(r"[^\W_]+", raw)) or " ".join(raw.split())


def signature(text: str) -> Signatures:
    """The MinHash of the text's shingles: uint16 [NUM_PERM], the low 16 bits of datasketch's 32."""
    from datasketch import MinHash

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < SHINGLE:
        codes = np.pad(codes, (0, SHINGLE - len(codes)))
    hashes = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    for k in range(SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[k : len(codes) - SHINGLE + 1 + k]
    shingles = np.unique(hashes >> np.uint64(32)).tolist()
    sketch = MinHash(NUM_PERM, hashfunc=_itself, permutations=_permutations(), scheme="affine32")
    for at in range(0, len(shingles), PIECE):
        sketch.update_batch(shingles[at : at + PIECE])
    return (np.asarray(sketch.hashvalues) & 0xFFFF).astype(np.uint16)


def _itself(value: int) -> int:
    return value


@lru_cache(maxsize=1)
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(NUM_PERM, seed=1, scheme="affine32").permutations


def find_equal(keys: Keys) -> DuplicatePairs:
    """Finds records with the key of an earlier record. `of` is the first record with that key."""
    if not len(keys):
        return NO_PAIRS
    order = np.argsort(keys, kind="stable")
    starts = np.r_[True, keys[order][1:] != keys[order][:-1]]
    firsts = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    again = np.flatnonzero(~starts)
    again = again[np.argsort(order[again])]
    return DuplicatePairs(order[again], firsts[again], np.ones(len(again)))


def join_signatures(parts: Sequence[Signatures], wanted: npt.NDArray[np.bool_] | None = None) -> Signatures:
    """Joins signatures in one memory-mapped file, so that gigabytes of them take no memory.

    Args:
        parts: Signatures of consecutive records.
        wanted: bool [records], the records to include. Default: all.

    Returns:
        uint16 [records, NUM_PERM].
    """
    total = int(wanted.sum()) if wanted is not None else sum(map(len, parts))
    if not total:
        return np.zeros((0, NUM_PERM), np.uint16)
    with tempfile.TemporaryFile() as file:  # deleted with the last mapping
        joined: Signatures = np.memmap(file, np.uint16, "w+", shape=(total, NUM_PERM))
    at = read = 0
    for part in parts:
        some = part if wanted is None else part[wanted[read : read + len(part)]]
        joined[at : at + len(some)] = some
        at, read = at + len(some), read + len(part)
    return joined


def find_near(signatures: Signatures, similarity: float = SIMILARITY) -> DuplicatePairs:
    """Finds near-duplicates of an earlier record that is kept.

    Memory: 24 bytes per record and per pair. Time: one sort per band. The result is deterministic; the earlier record of a pair
    is always kept.

    Args:
        signatures: uint16 [records, NUM_PERM], without duplicates.
        similarity: The minimum Jaccard similarity.

    Returns:
        One pair per near-duplicate.
    """
    common = _common(signatures)
    pairs = NO_PAIRS
    for keys, own in _bands(signatures, common):
        places = np.flatnonzero(own)
        order = places[np.argsort(keys[places], kind="stable")]  # groups of records that share the band, in order
        starts = np.r_[True, keys[order][1:] != keys[order][:-1]] if len(order) else np.zeros(0, bool)
        leader = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
        known = pairs.places * len(signatures) + pairs.of  # found in an earlier band: not compared again
        alike = [pairs]
        for step in range(ROUNDS):
            later = np.flatnonzero(leader + step < np.arange(len(order)))
            later, leads = order[later], order[leader[later] + step]
            new = np.isin(later * len(signatures) + leads, known, invert=True)
            alike += _alike(signatures, later[new], leads[new], common, similarity)
        pairs = DuplicatePairs.joined(alike)
    gone = np.zeros(len(signatures), bool)
    chosen = []
    for lo, hi in pairs.runs():
        stay = lo + np.flatnonzero(~gone[pairs.of[lo:hi]])
        if len(stay):
            chosen.append(stay[np.argmax(pairs.similarity[stay])])
            gone[pairs.places[lo]] = True
    return _rounded(pairs, chosen)


def find_near_to(both: Signatures, num: int, similarity: float = SIMILARITY) -> DuplicatePairs:
    """Finds training records that are near-duplicates of an eval record.

    Args:
        both: uint16 [records, NUM_PERM], the eval records first.
        num: The number of eval records.
        similarity: The minimum Jaccard similarity.

    Returns:
        Pairs of a training index and an eval index, each counted from 0 within its own set.
    """
    common = _common(both)
    pairs = NO_PAIRS
    for keys, use in _bands(both, common):
        order = np.argsort(keys[:num], kind="stable")
        order = order[use[:num][order]]
        places = np.flatnonzero(use[num:])
        lo = np.searchsorted(keys[:num][order], keys[num:][places], "left")
        hi = np.searchsorted(keys[:num][order], keys[num:][places], "right")
        alike = [pairs]
        for step in range(ROUNDS):
            some = np.flatnonzero(lo + step < hi)
            near = _alike(both, places[some] + num, order[lo[some] + step], common, similarity)
            alike += [DuplicatePairs(part.places - num, part.of, part.similarity) for part in near]
        pairs = DuplicatePairs.joined(alike)
    return _rounded(pairs, [lo + np.argmax(pairs.similarity[lo:hi]) for lo, hi in pairs.runs()])


def _rounded(pairs: DuplicatePairs, wanted: Any) -> DuplicatePairs:
    some = np.asarray(wanted, np.int64)
    return DuplicatePairs(pairs.places[some], pairs.of[some], pairs.similarity[some].round(3))


def _common(signatures: Signatures) -> npt.NDArray[np.bool_]:
    """bool [65536, NUM_PERM]: whether more than COMMON_SHARE of the records have this value in this slot."""
    limit = max(COMMON_RECORDS, COMMON_SHARE * len(signatures))
    counts = [np.bincount(signatures[:, slot], minlength=1 << 16) > limit for slot in range(NUM_PERM)]
    return np.stack(counts, axis=1)


def _bands(signatures: Signatures, common: npt.NDArray[np.bool_]) -> Iterator[tuple[Keys, npt.NDArray[np.bool_]]]:
    """For each band: the key of each record, and whether the band has a slot without a common value."""
    for at in range(0, NUM_PERM, BAND):
        part = np.ascontiguousarray(signatures[:, at : at + BAND])
        own = np.zeros(len(part), bool)
        for k in range(BAND):
            own |= ~common[part[:, k], at + k]
        yield part.view(np.uint64)[:, 0], own


def _alike(
    signatures: Signatures,
    places: npt.NDArray[np.int64],
    of: npt.NDArray[np.int64],
    common: npt.NDArray[np.bool_],
    similarity: float,
) -> list[DuplicatePairs]:
    """The pairs (places[i], of[i]) that are similar, compared PIECE at a time."""
    similar = []
    for lo in range(0, len(places), PIECE):
        rows, leads = places[lo : lo + PIECE], of[lo : lo + PIECE]
        values = _compare(signatures[rows], signatures[leads], common)
        near = values >= similarity
        if near.any():
            similar.append(DuplicatePairs(rows[near], leads[near], values[near]))
    return similar


def _compare(a: Signatures, b: Signatures, common: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The share of equal slots, without slots that share a common value; 0 if too few slots remain."""
    equal = a == b
    slots = np.arange(NUM_PERM)
    template = equal & common[b, slots]
    left = NUM_PERM - template.sum(axis=1)
    return np.where(left >= MIN_SLOTS, (equal & ~template).sum(axis=1) / np.maximum(left, 1), 0.0)
