"""Classification: allowed answers, their counts, contradicting records, and the eval records of each class.

Knows conversations and plain arrays, but not files, tokens or Ray.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ftray.chat import Conversation
from ftray.data.formats import BadRecord

Keys = npt.NDArray[np.uint64]


def check_labels(conversation: Conversation | str, labels: Sequence[str]) -> None:
    """Raises BadRecord (unknown_label) for an answer that is not a label, naming the answer and the closest label."""
    if isinstance(conversation, str):
        raise BadRecord("unknown_label", "plain text has no answer, but data.labels is set")
    for turn in conversation.messages:
        if turn.role != "assistant" or not turn.train or turn.content.strip() in labels:
            continue
        near = difflib.get_close_matches(turn.content.strip()[:80], labels, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise BadRecord("unknown_label", f"the answer {turn.content.strip()[:80]!r} is not one of data.labels{meant}")


@dataclass(frozen=True)
class LabelConflict:
    """Equal inputs with different answers. first, other: places of the first record and of the first that contradicts it."""

    first: int
    other: int
    num_records: int


def find_conflicts(prompts: Keys, answers: Keys) -> list[LabelConflict]:
    """Inputs with more than one answer, in the order of their first record. A prompt of 0 means that there is no input."""
    order = np.argsort(prompts, kind="stable")
    keys, sorted_answers = prompts[order], answers[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    ends = np.r_[starts[1:], len(keys)][: len(starts)]
    conflicts = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end - start < 2 or keys[start] == 0:
            continue
        differ = np.flatnonzero(sorted_answers[start:end] != sorted_answers[start])
        if len(differ):
            conflicts.append(LabelConflict(int(order[start]), int(order[start + differ[0]]), end - start))
    return sorted(conflicts, key=lambda c: c.first)


def count_labels(answers: Mapping[str | None, int], allowed: Sequence[str] | None) -> dict[str, int]:
    """Number of records per answer, most frequent first. Allowed answers that never occur come last with 0."""
    counts = Counter({label: number for label, number in answers.items() if label is not None})
    for label in allowed or ():
        counts.setdefault(label.strip(), 0)
    return dict(counts.most_common())


def pick_substitutes(
    strata: npt.NDArray[np.int64], digests: Keys, in_eval: npt.NDArray[np.bool_], fraction: float
) -> list[int]:
    """Training records that move to the eval set so that every class that is large enough has an eval record.

    The records come in the order of sources, paths and positions. If a class has had 1 / fraction distinct records and
    their hashes selected none of them, the last of these moves, and so does every later record that equals it. A
    decision depends on a record and on those before it: data that is appended never moves a record, and data that is inserted
    in front moves at most one record per class. (No rule that looks at the set alone can promise an eval record without moving
    any: it would have to select all but 1 / fraction records.)

    Args:
        strata: int64 [records], the class of each record.
        digests: uint64 [records], the hash of each record.
        in_eval: bool [records], whether its hash puts a record into the eval set.
        fraction: data.eval.fraction.

    Returns:
        The places of the records.
    """
    needed = -(-1 // fraction) if fraction else 0
    digests_of: dict[int, set[int]] = {}  # of classes without an eval record
    done: dict[int, int | None] = {}  # the substitute's digest, or None if a hash selected an eval record
    places = []
    records = zip(map(int, strata), map(int, digests), in_eval, strict=True)  # one at a time: there may be millions
    for place, (stratum, digest, held) in enumerate(records):
        if stratum in done:
            if done[stratum] == digest and not held:
                places.append(place)
            continue
        known = digests_of.setdefault(stratum, set())
        if held:
            done[stratum] = None
        else:
            known.add(digest)
            if len(known) >= needed:
                done[stratum] = digest
                places.append(place)
        if stratum in done:
            del digests_of[stratum]
    return places
