"""Records that `ftray data stats` shows as the model sees them: the first, the longest, one of each class, rejected ones.

The record tables say where these records are. Only they are read and tokenized again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ftray.chat import ChatFormat, Encoded
from ftray.data.chunks import DatasetSpec
from ftray.data.examples import Example, read_examples
from ftray.data.index import ChunkFacts, Index
from ftray.data.preview import TokenSpan, pieces
from ftray.data.record_table import RecordTable
from ftray.data.sources import line_number

MAX_CLASSES, MAX_REJECTED = 8, 6
MAX_CHARS = 1200  # of a document that is shown


@dataclass(frozen=True)
class ShownRecord:
    """A record to show.

    Attributes:
        title: Why it is shown, and where it is.
        note: Its size, or why it was rejected.
        documents: The spans of each of its documents. Of a rejected record: its beginning, as one span.
    """

    title: str
    note: str
    documents: list[list[TokenSpan]] = field(default_factory=list)


def pick_records(
    index: Index, table: RecordTable, kept: npt.NDArray[np.bool_], stream: DatasetSpec, labels: list[str]
) -> list[ShownRecord]:
    """The records to show of a training set.

    Args:
        index: Its index.
        table: Its record tables.
        kept: bool [records], those that are in the sequences.
        stream: The training set.
        labels: The classes of which one record is shown.
    """
    places = np.flatnonzero(kept)
    if not len(places):
        return rejected_records(index)
    lengths = table.column("num_tokens")
    chosen = {"the first record": int(places[0]), "the longest record": int(places[np.argmax(lengths[places])])}
    if labels:
        answers = table.texts("label").to_pylist() if len(table) else []
        for label in labels[:MAX_CLASSES]:
            place = next((int(p) for p in places if answers[p] == label), None)
            if place is not None:
                chosen[f"a record of the class {label!r}"] = place
    chat = ChatFormat(stream.load_tokenizer(), train_on=stream.train_on)
    shown = [_shown(title, place, index, table, stream, chat) for title, place in chosen.items()]
    return [record for record in shown if record is not None] + rejected_records(index)


def rejected_records(index: Index) -> list[ShownRecord]:
    """The first bad record of each rule."""
    first: dict[str, ShownRecord] = {}
    for entry in index.bad:
        if entry.rule not in first and len(first) < MAX_REJECTED:
            name = entry.uri.rpartition("/")[2]
            place = _place(name, entry.uri, entry.position)
            span = TokenSpan(entry.excerpt, "context", trained=False)
            first[entry.rule] = ShownRecord(
                f"rejected ({entry.rule}): {place}", f"{entry.detail}; {entry.fix}", [[span]]
            )
    return list(first.values())


def _shown(
    title: str, place: int, index: Index, table: RecordTable, stream: DatasetSpec, chat: ChatFormat
) -> ShownRecord | None:
    number = table.chunk_of(place)
    example = _read(index.facts[number], table.position(number, place), stream, chat)
    if example is None:
        return None
    piece, position = table.where(place)
    documents = [Encoded(ids, mask) for ids, mask in example.encoded.documents()]
    num_trained = sum(int(np.count_nonzero(document.loss_mask)) for document in documents)
    note = f"{len(example.encoded.input_ids)} tokens, {num_trained} trained"
    return ShownRecord(
        f"{title}: {_place(piece.path, piece.uri, position)}", note, [clip(pieces(chat, d)) for d in documents]
    )


def _read(facts: ChunkFacts, position: int, stream: DatasetSpec, chat: ChatFormat) -> Example | None:
    items = read_examples(facts.chunk, chat, stream.rules(facts.chunk.source))
    return next((item for item in items if isinstance(item, Example) and item.position == position), None)


def _place(path: str, uri: str, position: int) -> str:
    line = line_number(uri, position)
    return f"{path}, line {line}" if line else f"{path}, record {position}"


def clip(spans: list[TokenSpan]) -> list[TokenSpan]:
    """The beginning of a document."""
    left, shown = MAX_CHARS, []
    for number, span in enumerate(spans):
        if len(span.text) > left:
            rest = sum(len(each.text) for each in spans[number:]) - left
            shown.append(TokenSpan(f"{span.text[:left]} … ({rest:,} more characters)", span.kind, span.trained))
            break
        shown.append(span)
        left -= len(span.text)
    return shown
