"""What is found over all records, not in one chunk: duplicates, overlap with the held-out data, conflicts, poor quality.

From the tables of `records` alone. Where `data.clean` says `drop`, a finding takes its record out of training; held-out
records are never taken out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray import config
from ftray.data.duplicates import find_equal, find_near, find_near_to, join_signatures
from ftray.data.labels import find_conflicts, pick_substitutes
from ftray.data.overlap import find_leaks
from ftray.data.records import QUALITY, Survey
from ftray.data.sources import Chunk


@dataclass(frozen=True)
class Finding:
    """A training record that a rule speaks of. of_uri, of_position: the record that it repeats, gives away or contradicts.

    rule: duplicate, near_duplicate, overlap, conflict, or a quality rule. similarity: 1.0 for equal ones.
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
        """What is wrong, in words."""
        other = f"{self.of_uri}, record at {self.of_position}"
        if self.rule == "duplicate":
            return f"says the same as {other}"
        if self.rule == "near_duplicate":
            return f"says nearly the same as {other} (similarity {self.similarity})"
        if self.rule == "overlap":
            return f"gives the held-out record away: {other} (share {self.similarity})"
        if self.rule == "conflict":
            return f"has the same input as {other} and another answer"
        return {
            "short_answer": "its answer is shorter than data.clean.min_answer_chars",
            "repeated_lines": "more than half of its lines are repeated",
            "unprintable": "more than a tenth of its characters can't be printed",
        }[self.rule]


def find_all(train: Survey, heldout: Survey | None, clean: config.Clean) -> tuple[list[Finding], dict[int, list[int]]]:
    """Findings in the records' order, and for each chunk (its place) the positions that are dropped.

    A record is dropped once, by the first rule that says so, in the order of the keys of `data.clean`. Memory: about
    110 bytes a record, and the findings; signatures and sequences stay on disk.
    """
    found: list[tuple[int, Finding]] = []
    gone: set[int] = set()

    def note(rule: str, mode: str, hits: Iterable[tuple[int, tuple[Chunk, int] | None, float | None]]) -> None:
        for place, other, similarity in hits:
            chunk, position = train.where(place)
            of_uri, of_position = (other[0].uri, other[1]) if other else (None, None)
            drops = mode == "drop" and place not in gone
            found.append((place, Finding(rule, chunk.uri, position, of_uri, of_position, similarity, drops)))
            if drops:
                gone.add(place)

    equal = find_equal(train.column("whole")) if (clean.duplicates, clean.near_duplicates) != ("off", "off") else []
    if clean.duplicates != "off":
        note("duplicate", clean.duplicates, [(p.place, train.where(p.of), 1.0) for p in equal])
    if clean.near_duplicates != "off":
        first = np.ones(len(train), bool)
        first[[p.place for p in equal]] = False
        own = np.flatnonzero(first)
        near = find_near(join_signatures(train.signatures(), first))
        hits = [(int(own[p.place]), train.where(int(own[p.of])), p.similarity) for p in near]
        note("near_duplicate", clean.near_duplicates, hits)
    if clean.overlap != "off" and heldout is not None:
        note("overlap", clean.overlap, _overlaps(train, heldout))
    if clean.quality != "off":
        flags = train.column("flags")
        for rule, bit in QUALITY.items():
            note(rule, clean.quality, [(int(place), None, None) for place in np.flatnonzero(flags & bit)])
    conflicts = find_conflicts(train.column("prompt"), train.column("answer"))
    note("conflict", "report", [(c.other, train.where(c.first), None) for c in conflicts])
    drops: dict[int, list[int]] = {}
    chunks, positions = train.chunk_numbers(), train.column("position")
    for place in sorted(gone):
        drops.setdefault(int(chunks[place]), []).append(int(positions[place]))
    found.sort(key=lambda item: item[0])
    return [finding for _, finding in found], drops


def _overlaps(train: Survey, heldout: Survey) -> list[tuple[int, tuple[Chunk, int], float]]:
    """(training record, held-out record, share): equal inputs first, then shared sequences, then near-duplicates."""
    prompts = heldout.column("prompt")
    order = np.argsort(prompts, kind="stable")
    own = train.column("prompt")
    at = np.minimum(np.searchsorted(prompts[order], own), max(0, len(prompts) - 1))
    same = np.flatnonzero((prompts[order][at] == own) & (own != 0)) if len(prompts) else np.zeros(0, np.int64)
    best = {int(place): (int(order[at[place]]), 1.0) for place in same}
    for column in ("all_grams", "grams"):
        for leak in find_leaks(heldout.grams(column), train.grams()):
            if leak.place not in best or leak.share > best[leak.place][1]:
                best[leak.place] = (leak.of, leak.share)
    both = join_signatures([*heldout.signatures(), *train.signatures()])
    for pair in find_near_to(both, len(heldout)):
        best.setdefault(pair.place, (pair.of, pair.similarity))
    return [(place, heldout.where(of), share) for place, (of, share) in sorted(best.items())]


def find_moved(train: Survey, heldout: Survey, fraction: float) -> dict[int, tuple[int, ...]]:
    """For each chunk (its place) the positions of the records that `labels.pick_substitutes` holds out."""
    parts = [train, heldout]
    chunks = np.concatenate([p.chunk_numbers() for p in parts])
    positions = np.concatenate([p.column("position") for p in parts])
    digests = np.concatenate([p.column("digest") for p in parts])
    order = np.lexsort((positions, chunks))
    held = order >= len(train)
    places = pick_substitutes(_codes([p.texts("stratum") for p in parts])[order], digests[order], held, fraction)
    moved: dict[int, list[int]] = {}
    for place in places:
        moved.setdefault(int(chunks[order[place]]), []).append(int(positions[order[place]]))
    return {chunk: tuple(found) for chunk, found in moved.items()}


def _codes(texts: list[pa.ChunkedArray]) -> npt.NDArray[np.int64]:
    """A number for each string, the same for equal ones."""
    whole = pa.chunked_array([part for column in texts for part in column.chunks], texts[0].type)
    parts = [part.indices.to_numpy() for part in whole.dictionary_encode().unify_dictionaries().chunks]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def with_changes(
    chunks: Iterable[Chunk], dropped: dict[int, list[int]], moved: dict[int, tuple[int, ...]]
) -> list[Chunk]:
    """Descriptors that name what is dropped and moved."""
    return [replace(chunk, dropped=tuple(dropped.get(i, ())), moved=moved.get(i, ())) for i, chunk in enumerate(chunks)]
