"""Checks over all records together: duplicates, contamination of the eval set, conflicts and poor quality.

They use the record tables only. If a rule of `data.clean` is `drop`, its findings remove records from training. Eval records
are never removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray import config
from ftray.data.checks.contamination import find_leaks
from ftray.data.checks.dedup import NO_PAIRS, DuplicatePairs, find_equal, find_near, find_near_to, join_signatures
from ftray.data.checks.labels import find_conflicts, pick_substitutes
from ftray.data.record_table import QUALITY, RecordTable
from ftray.data.sources import Chunk

RULES = ("duplicate", "near_duplicate", "contamination", *QUALITY, "conflict")


@dataclass(frozen=True)
class DataFinding:
    """A training record that a check found.

    Attributes:
        rule: duplicate, near_duplicate, contamination, conflict, or a quality rule.
        uri: The record's shard.
        position: The record's position in it.
        of_uri: The shard of the record that it repeats, overlaps with or contradicts.
        of_position: The position of that record.
        similarity: 1.0 for equal records.
        dropped: Whether it is removed from training.
    """

    rule: str
    uri: str
    position: int
    of_uri: str | None
    of_position: int | None
    similarity: float | None
    dropped: bool

    @property
    def detail(self) -> str:
        """The finding as a sentence."""
        other = f"{self.of_uri}, record at {self.of_position}"
        if self.rule == "duplicate":
            return f"repeats {other}"
        if self.rule == "near_duplicate":
            return f"nearly repeats {other} (similarity {self.similarity})"
        if self.rule == "contamination":
            return f"overlaps with the eval record {other} (share {self.similarity})"
        if self.rule == "conflict":
            return f"has the same input as {other}, but another answer"
        return {
            "short_answer": "its answer is shorter than data.clean.min_answer_chars",
            "repeated_lines": "more than half of its lines are repeated",
            "unprintable": "more than a tenth of its characters are unprintable",
        }[self.rule]


class CheckResult:
    """All findings, as columns sorted by record: 26 bytes per finding.

    Attributes:
        gone: bool [training records], the dropped ones.
    """

    def __init__(self, train: RecordTable, eval_set: RecordTable | None) -> None:
        self._train, self._eval = train, eval_set
        self._parts: list[tuple[DuplicatePairs, int, npt.NDArray[np.bool_]]] = []
        self.gone = np.zeros(len(train), bool)

    def note(self, rule: str, mode: str, pairs: DuplicatePairs) -> None:
        """Adds the findings of a rule. In the mode `drop` they remove records that are still in training."""
        drops = ~self.gone[pairs.places] if mode == "drop" else np.zeros(len(pairs), bool)
        self.gone[pairs.places[drops]] = True
        self._parts.append((pairs, RULES.index(rule), drops))

    def __len__(self) -> int:
        return sum(len(pairs) for pairs, _, _ in self._parts)

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each rule, the number of records that it found and of those that stay in training; the most frequent rule first."""
        counted = {
            RULES[rule]: (len(pairs), int((~self.gone[pairs.places]).sum()))
            for pairs, rule, _ in self._parts
            if len(pairs)
        }
        merged: dict[str, tuple[int, int]] = dict(sorted(counted.items(), key=lambda item: -item[1][0]))
        return merged

    def drops(self) -> dict[int, list[int]]:
        """Positions of the dropped records, by number of the chunk."""
        dropped: dict[int, list[int]] = {}
        for place in np.flatnonzero(self.gone).tolist():
            chunk = self._train.chunk_of(place)
            dropped.setdefault(chunk, []).append(self._train.position(chunk, place))
        return dropped

    def __iter__(self) -> Iterator[DataFinding]:
        """In the records' order, and for one record in the rules' order."""
        places = np.concatenate([pairs.places for pairs, _, _ in self._parts] or [np.zeros(0, np.int64)])
        begins = np.cumsum([0, *(len(pairs) for pairs, _, _ in self._parts)])
        for i in np.argsort(places, kind="stable").tolist():
            part = int(np.searchsorted(begins, i, "right")) - 1
            pairs, rule, drops = self._parts[part]
            yield self._finding(pairs, RULES[rule], bool(drops[i - begins[part]]), int(i - begins[part]))

    def _finding(self, pairs: DuplicatePairs, rule: str, dropped: bool, i: int) -> DataFinding:
        piece, position = self._train.where(int(pairs.places[i]))
        of, similarity = int(pairs.of[i]), float(pairs.similarity[i])
        if of < 0:
            return DataFinding(rule, piece.uri, position, None, None, None, dropped)
        others = self._eval if rule == "contamination" and self._eval is not None else self._train
        other, of_position = others.where(of)
        known = None if np.isnan(similarity) else similarity
        return DataFinding(rule, piece.uri, position, other.uri, of_position, known, dropped)


def find_all(train: RecordTable, eval_set: RecordTable | None, clean: config.CleanConfig) -> CheckResult:
    """Applies the rules of `data.clean`. A record is dropped once, by the first rule that drops it, in the order of the keys.

    Memory: about 110 bytes per record, and the findings. Signatures and grams stay on disk.
    """
    result = CheckResult(train, eval_set)
    equal = (
        find_equal(train.column("whole")) if (clean.duplicates, clean.near_duplicates) != ("off", "off") else NO_PAIRS
    )
    if clean.duplicates != "off":
        result.note("duplicate", clean.duplicates, equal)
    if clean.near_duplicates != "off":
        first = np.ones(len(train), bool)
        first[equal.places] = False
        own = np.flatnonzero(first)
        near = find_near(join_signatures(train.signatures(), first))
        result.note(
            "near_duplicate", clean.near_duplicates, DuplicatePairs(own[near.places], own[near.of], near.similarity)
        )
    if clean.contamination != "off" and eval_set is not None:
        result.note("contamination", clean.contamination, _contaminated(train, eval_set))
    if clean.quality != "off":
        flags = train.column("flags")
        for rule, bit in QUALITY.items():
            result.note(rule, clean.quality, _without_others(np.flatnonzero(flags & bit)))
    conflicts = find_conflicts(train.column("prompt"), train.column("answer"))
    others = np.array([c.other for c in conflicts], np.int64)
    firsts = np.array([c.first for c in conflicts], np.int64)
    result.note("conflict", "report", DuplicatePairs(others, firsts, np.full(len(conflicts), np.nan)))
    return result


def _without_others(places: npt.NDArray[np.int64]) -> DuplicatePairs:
    return DuplicatePairs(places, np.full(len(places), -1), np.full(len(places), np.nan))


def _contaminated(train: RecordTable, eval_set: RecordTable) -> DuplicatePairs:
    """Training records with the eval record that each contains: equal inputs, then shared n-grams, then near-duplicates."""
    prompts = eval_set.column("prompt")
    order = np.argsort(prompts, kind="stable")
    own = train.column("prompt")
    at = np.minimum(np.searchsorted(prompts[order], own), max(0, len(prompts) - 1))
    same = np.flatnonzero((prompts[order][at] == own) & (own != 0)) if len(prompts) else np.zeros(0, np.int64)
    best = {int(place): (int(order[at[place]]), 1.0) for place in same}
    for column in ("all_grams", "grams"):
        for leak in find_leaks(eval_set.grams(column), train.grams()):
            if leak.place not in best or leak.share > best[leak.place][1]:
                best[leak.place] = (leak.of, leak.share)
    both = join_signatures([*eval_set.signatures(), *train.signatures()])
    for pair in find_near_to(both, len(eval_set)):
        best.setdefault(pair.place, (pair.of, pair.similarity))
    places = sorted(best)
    return DuplicatePairs(
        np.array(places, np.int64),
        np.array([best[place][0] for place in places], np.int64),
        np.array([best[place][1] for place in places], np.float64),
    )


def find_moved(train: RecordTable, eval_set: RecordTable, fraction: float) -> dict[int, tuple[int, ...]]:
    """Positions of the records that `labels.pick_substitutes` moves to the eval set, by number of the chunk."""
    parts = [train, eval_set]
    chunks = np.concatenate([p.chunk_numbers() for p in parts])
    positions = np.concatenate([p.column("position") for p in parts])
    digests = np.concatenate([p.column("digest") for p in parts])
    order = np.lexsort((positions, chunks))
    held = order >= len(train)
    places = pick_substitutes(_codes([p.texts("stratum") for p in parts])[order], digests[order], held, fraction)
    moved: dict[int, list[int]] = {}
    for place in places:
        moved.setdefault(int(chunks[order[place]]), []).append(int(positions[order[place]]))
    return {chunk: tuple(at) for chunk, at in moved.items()}


def _codes(texts: list[pa.ChunkedArray]) -> npt.NDArray[np.int64]:
    """A number for each string; equal strings have equal numbers."""
    whole = pa.chunked_array([part for column in texts for part in column.chunks], texts[0].type)
    parts = [part.indices.to_numpy() for part in whole.dictionary_encode().unify_dictionaries().chunks]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def with_changes(
    chunks: Iterable[Chunk], dropped: dict[int, list[int]], moved: dict[int, tuple[int, ...]]
) -> list[Chunk]:
    """Descriptors with the positions of dropped and moved records."""
    return [replace(chunk, dropped=tuple(dropped.get(i, ())), moved=moved.get(i, ())) for i, chunk in enumerate(chunks)]
