"""Shows the first records as the model will see them: which tokens are trained on, and which are context. Needs no Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ftray.chat import ChatFormat, Encoded
from ftray.console import Console
from ftray.data.chunks import DatasetSpec
from ftray.data.examples import Example, Quarantined, read_examples
from ftray.data.packing import best_fit
from ftray.data.sources import Chunk, Piece, cut_source, line_number, list_shards

# kind of a span → escape codes before and after it: green, dim, inverted
COLORS = {"trained": ("\x1b[32m", "\x1b[0m"), "context": ("\x1b[2m", "\x1b[0m"), "special": ("\x1b[7m", "\x1b[0m")}
LEGEND = {
    True: "\x1b[32mtrained\x1b[0m · \x1b[2mcontext\x1b[0m · \x1b[7mspecial token\x1b[0m (underlined: also trained)",
    False: "{+trained+}, everything else is context",
}


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one kind: `trained`, `context` or `special`."""

    text: str
    kind: str
    trained: bool


def uses_color(console: Console) -> bool:
    """Whether trained tokens are shown in color instead of plain marks."""
    return console.is_terminal and not os.environ.get("NO_COLOR")


def show_preview(stream: DatasetSpec, chunk_bytes: int, number: int, console: Console) -> int:
    """Prints the first `number` records of each source as the model will see them.

    Returns:
        The number of bad records among them.

    Raises:
        DataError: A source is missing or cannot be read.
    """
    color, num_bad = uses_color(console), 0
    for source in stream.sources:
        list_shards(source.path)  # an error about a path needs no legend above it
    chat = ChatFormat(stream.load_tokenizer(), train_on=stream.train_on)
    console.say(LEGEND[color], styled=True)
    for i, source in enumerate(stream.sources):
        console.say(f"\n{source.path}")
        lengths = []
        for chunk, item in islice(_records(stream, i, chunk_bytes, chat), number):
            piece, position = place_of(chunk, item)
            line = line_number(piece.uri, position)
            where = f"{piece.path}, {f'line {line}' if line else f'record {position}'}"
            if isinstance(item, Quarantined):
                num_bad += 1
                console.say(f"\n--- {where}: bad ({item.rule}): {item.detail}; {item.fix}")
                continue
            documents = [Encoded(ids, mask) for ids, mask in item.encoded.documents()]
            for n, document in enumerate(documents, 1):
                num_tokens, num_trained = len(document.input_ids), sum(document.loss_mask)
                lengths.append(num_tokens)
                which = f", answer {n} of {len(documents)}" if len(documents) > 1 else ""
                console.say(f"\n--- {where}{which}: {num_tokens} tokens, {num_trained} trained")
                console.say(paint(pieces(chat, document), color), styled=True)
        if stream.packing and lengths:
            sequences = [[lengths[place] for place in sequence] for sequence in best_fit(lengths, stream.max_seq_len)]
            packed = ", ".join(" + ".join(map(str, sequence)) for sequence in sequences)
            console.say(f"\npacked alone, in sequences of {stream.max_seq_len} tokens: {packed}")
    return num_bad


def place_of(chunk: Chunk, item: Example | Quarantined) -> tuple[Piece, int]:
    """The file of a record, and its identity in it."""
    if isinstance(item, Example):
        return chunk.locate(item.position)
    return next(piece for piece in chunk.pieces if piece.uri == item.uri), item.position


def _records(
    stream: DatasetSpec, source: int, chunk_bytes: int, chat: ChatFormat
) -> Iterator[tuple[Chunk, Example | Quarantined]]:
    for chunk in cut_source(list_shards(stream.sources[source].path), source, chunk_bytes):
        for item in read_examples(chunk, chat, stream.rules(source)):
            yield chunk, item


def pieces(chat: ChatFormat, encoded: Encoded) -> list[TokenSpan]:
    """The decoded text, cut wherever tokens start or stop being trained on or special."""
    kinds = [
        ("special" if chat.is_special(token) else "trained" if trained else "context", trained)
        for token, trained in zip(encoded.input_ids, encoded.loss_mask, strict=True)
    ]
    spans: list[TokenSpan] = []
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start]:
            text = chat.decode(encoded.input_ids[start:end], before=encoded.input_ids[:start])
            spans.append(TokenSpan(text, *kinds[start]))
            start = end
    return spans


def paint(shown: list[TokenSpan], color: bool) -> str:
    """Spans as text for a terminal, or with plain marks. Control characters of the data are escaped."""
    if not color:
        parts, open_ = [], False
        for piece in shown:
            if piece.trained != open_:
                parts.append("{+" if piece.trained else "+}")
                open_ = piece.trained
            parts.append(_visible(piece.text))
        return "".join(parts) + ("+}" if open_ else "")
    return "".join(
        COLORS[p.kind][0]
        + ("\x1b[4m" if p.kind == "special" and p.trained else "")
        + _visible(p.text)
        + COLORS[p.kind][1]
        for p in shown
    )


def _visible(text: str) -> str:
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
