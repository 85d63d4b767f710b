"""Are planted copies found in real data? `python bench/dedup_trial.py DIRECTORY` with gsm8k/ and banking77/ below it.

Into the training records of each set go 200 near-duplicates (two words swapped, other casing, other punctuation, one
word edited) and 50 held-out records (as they are, in capitals without punctuation, inside a longer message). Told are
the recall of each kind, and the false positives: records that are reported in the set with the plants and not in the
set without them, although they are no plants. What is reported without any plants is the set's own; of its pairs the
true likeness is worked out from the texts.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

SETS = {"gsm8k": ("question", "answer"), "banking77": ("text", "category")}
NUM_NEAR, NUM_LEAKED, CHUNK_BYTES = 200, 50, 1_000_000
Record = dict[str, str]


def read_set(directory: Path, part: str) -> list[Record]:
    """Records of a part of a set, whichever of its two formats it has."""
    path = directory / f"{part}.jsonl"
    if path.exists():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with (directory / f"{part}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def edit(rng: random.Random, text: str, way: str, words: list[str]) -> str:
    """A near-duplicate of a text."""
    parts = text.split()
    at = rng.randrange(max(1, len(parts) - 1))
    if way == "two words swapped" and len(parts) > 1:
        parts[at], parts[at + 1] = parts[at + 1], parts[at]
    elif way == "one word edited":
        parts[at] = rng.choice(words)
    elif way == "other casing":
        return text.swapcase()
    else:
        return text.replace(".", " !").replace("?", " ?!").replace(" ", ", ", 1)
    return " ".join(parts)


def leak(text: str, way: str) -> str:
    """A held-out question as it may be found in training data."""
    if way == "in capitals":
        return text.upper().replace("?", "").replace(".", "")
    if way == "inside a longer message":
        return (
            f"Hello, I hope that someone here can help me with what follows. {text} Many thanks in advance to you all!"
        )
    return text


def plant(train: list[Record], heldout: list[Record], question: str, seed: int) -> tuple[list[Record], list[str]]:
    """Plants and, for each, its kind."""
    rng = random.Random(seed)
    words = [word for record in rng.sample(train, 500) for word in record[question].split()]
    plants, kinds = [], []
    ways = ["two words swapped", "other casing", "other punctuation", "one word edited"]
    for n, record in enumerate(rng.sample(train, NUM_NEAR)):
        plants.append({**record, question: edit(rng, record[question], ways[n % 4], words)})
        kinds.append(f"near: {ways[n % 4]}")
    ways = ["as it is", "in capitals", "inside a longer message"]
    for n, record in enumerate(rng.sample(heldout, NUM_LEAKED)):
        plants.append({**record, question: leak(record[question], ways[n % 3])})
        kinds.append(f"leaked: {ways[n % 3]}")
    return plants, kinds


def write(path: Path, records: list[Record]) -> list[int]:
    """Writes a shard; returns the records' positions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    path.write_bytes(b"".join(lines))
    return [sum(map(len, lines[:n])) for n in range(len(lines))]


def find(directory: Path, columns: Record, model: Path) -> tuple[list[Any], float]:
    """Findings of the index of directory/train against directory/eval, and the seconds that it took."""
    from ftray import config
    from ftray.data.chunks import streams
    from ftray.data.index import build_index
    from ftray.model.load import load_tokenizer
    from tests.rows import read_findings

    source = {"columns": columns}
    data = config.DataConfig(
        max_seq_len=8192,
        train=[{"path": str(directory / "train"), **source}],  # type: ignore[list-item]
        eval=[{"path": str(directory / "eval"), **source}],  # type: ignore[arg-type]
    )
    stream, _ = streams(data, partial(load_tokenizer, config.ModelConfig(base=str(model))))
    begin = time.monotonic()
    index = build_index(stream, CHUNK_BYTES, str(directory / "index"), "trial")
    found = read_findings(index, str(directory / "index"))
    return [f for f in found if f.rule in ("duplicate", "near_duplicate", "contamination")], time.monotonic() - begin


def likeness(one: Record, other: Record) -> float:
    """True likeness (Jaccard of five-character sequences) of two records."""
    from ftray.chat import Message
    from ftray.data.checks.dedup import SHINGLE, spoken_text

    texts = [spoken_text([Message("user", text) for text in record.values()]) for record in (one, other)]
    sets = [{text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in texts]
    return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))


def trial(directory: Path, name: str, work: Path, model: Path) -> None:
    """Tells how a set fares."""
    question, answer = SETS[name]
    columns = {"user": question, "assistant": answer}
    train, heldout = read_set(directory / name, "train"), read_set(directory / name, "test")
    own = write(work / name / "train/a.jsonl", train)
    write(work / name / "eval/e.jsonl", heldout)
    before, seconds = find(work / name, columns, model)
    plants, kinds = plant(train, heldout, question, seed=0)
    places = write(work / name / "train/planted.jsonl", plants)
    after, more = find(work / name, columns, model)

    def at(f: Any) -> tuple[str, int]:
        return Path(f.uri).name, f.position

    print(
        f"{name}: {len(train)} + {len(plants)} training records, {len(heldout)} held out; {seconds:.1f} s, then {more:.1f} s"
    )
    rules: dict[tuple[str, int], set[str]] = {}
    for finding in after:
        rules.setdefault(at(finding), set()).add(finding.rule)
    total, hit = Counter(kinds), Counter[str]()
    for kind, place in zip(kinds, places, strict=True):
        wanted = {"contamination"} if kind.startswith("leaked") else {"duplicate", "near_duplicate"}
        hit[kind] += bool(wanted & rules.get(("planted.jsonl", place), set()))
    for group in ("near", "leaked"):
        of = [kind for kind in total if kind.startswith(group)]
        found, planted = sum(hit[k] for k in of), sum(total[k] for k in of)
        print(f"  {group}: recall {found}/{planted} = {found / planted:.3f}")
        for kind in of:
            print(f"    {kind.split(': ')[1]:<26}{hit[kind]}/{total[kind]}")
    known = {(at(f), f.rule) for f in before}
    false = [f for f in after if at(f)[0] == "a.jsonl" and (at(f), f.rule) not in known]
    print(f"  false positives: {len(false)} of {len(train)} records that are no plants")
    counts = Counter(f.rule for f in before)
    print(f"  found in the set itself: {dict(counts)}")
    by_place = dict(zip(own, train, strict=True))
    alike = [likeness(by_place[f.position], by_place[f.of_position]) for f in before if f.rule == "near_duplicate"]
    if alike:
        below = sum(value < 0.6 for value in alike)
        mean = sum(alike) / len(alike)
        print(
            f"  its near-duplicates are truly alike by {mean:.2f} on average; {below} of {len(alike)} by less than 0.6"
        )


def main(directory: Path) -> int:
    """All sets."""
    from tests import cluster, tiny

    with tempfile.TemporaryDirectory() as work, cluster.local_ray(2):
        model = tiny.write_tiny_model(Path(work) / "model")
        for name in SETS:
            trial(directory, name, Path(work), model)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
