"""Turns a chunk into packed sequences: the one pure function that both the index pass and training run.

Knows sources, formats, cleaning and packing, but not order, epochs or Ray. The same descriptor gives the same sequences on any
machine and in any process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from ftray import config, storage
from ftray.chat import ChatFormat, TrainOn, read_tools
from ftray.data.decompress import MAX_RECORD_BYTES
from ftray.data.examples import Example, Quarantined, Rules, read_examples
from ftray.data.packing import PackedSequence, concatenate, pack_documents, pack_examples
from ftray.data.sources import Chunk
from ftray.data.tokenizer import BatchTokenizer, TokenizerLoader, backend_json
from ftray.errors import DataError
from ftray.storage import strict_json

WHOLE = TrainOn()


@dataclass(frozen=True)
class DatasetSpec:
    """Training or eval data: its sources, and the settings that turn a chunk into packed sequences.

    Attributes:
        part: `train` or `eval` if one set of sources is split by `eval_fraction`, else None.
        load_tokenizer: Picklable. Called once per process.
        data: The section of the run file. None skips all checks that need every record.
        slices: A column that examples keep (`Example.slice`). It does not change the sequences.
        tools: For each source, the tools of records that have none of their own. Empty: no source has any.
    """

    sources: tuple[config.SourceConfig, ...]
    max_seq_len: int
    packing: bool
    eval_fraction: float | None
    part: str | None
    load_tokenizer: Callable[[], Any]
    data: config.DataConfig | None = None
    is_eval: bool = False
    slices: str | None = None
    tools: tuple[tuple[dict[str, Any], ...], ...] = ()

    @property
    def train_on(self) -> TrainOn:
        """The parts of answers to train on."""
        return TrainOn(**self.data.train_on.model_dump()) if self.data else WHOLE

    def rules(self, source: int) -> Rules:
        """Cleaning rules of one source."""
        s = self.sources[source]
        columns = None if s.columns is None else {str(role): column for role, column in s.columns.items()}
        split = self.data.eval if self.data and isinstance(self.data.eval, config.SplitConfig) else None
        labels = tuple(label.strip() for label in self.data.labels) if self.data and self.data.labels else None
        return Rules(
            self.max_seq_len,
            s.format,
            columns,
            self.eval_fraction,
            self.part,
            split.stratify if split else None,
            split.group if split else None,
            labels,
            self.slices,
            frozenset(s.ignore),
            self.tools[source] if self.tools else (),
            self.data.too_long if self.data else "error",
            self.joins_text,
        )

    @property
    def joins_text(self) -> bool:
        """Whether the texts of a chunk are joined and cut where a sequence is full."""
        return self.data is not None and self.data.pack_text == "concatenate"


@dataclass(frozen=True)
class PackedChunk:
    """The packed sequences of a chunk, in packing order.

    Attributes:
        sequences: The packed sequences.
        examples: The examples in them.
        owners: For each document (`PackedSequence.documents`), the index of its example.
        bad: The bad records.
    """

    sequences: list[PackedSequence]
    examples: list[Example]
    owners: list[int]
    bad: list[Quarantined]

    @property
    def digest(self) -> str:
        """Hash of the sequences' input_ids and labels, which are all that training sees of the chunk."""
        digest = hashlib.blake2b(digest_size=16)
        for sequence in self.sequences:
            digest.update(sequence.input_ids.tobytes())
            digest.update(sequence.labels.tobytes())
        return digest.hexdigest()


def streams(
    data: config.DataConfig, load_tokenizer: Callable[[], Any], slices: str | None = None
) -> tuple[DatasetSpec, DatasetSpec | None]:
    """The training data and, if the run has one, the eval set.

    Args:
        data: The section of the run file.
        load_tokenizer: Picklable.
        slices: `evaluate.slices`, a column that records may have for that purpose alone.

    Raises:
        DataError: A source's tools cannot be read.
    """
    loader = load_tokenizer if isinstance(load_tokenizer, TokenizerLoader) else TokenizerLoader(load_tokenizer)

    def stream(
        sources: list[config.SourceConfig], fraction: float | None, part: str | None, is_eval: bool
    ) -> DatasetSpec:
        shape = (data.max_seq_len, data.packing, fraction, part, loader)
        tools = tuple(_read_tools(source) for source in sources)
        return DatasetSpec(tuple(sources), *shape, data, is_eval, slices, tools if any(tools) else ())

    if data.eval is None:
        return stream(data.train, None, None, False), None
    if isinstance(data.eval, config.SplitConfig):
        fraction = data.eval.fraction
        return stream(data.train, fraction, "train", False), stream(data.train, fraction, "eval", True)
    return stream(data.train, None, None, False), stream(data.eval, None, None, True)


def _read_tools(source: config.SourceConfig) -> tuple[dict[str, Any], ...]:
    raw, origin = source.tools, f"the tools of {source.path}"
    try:
        if isinstance(raw, str):
            origin = storage.absolute(raw)
            raw = strict_json.parse(storage.read_bytes(origin), max_bytes=MAX_RECORD_BYTES)
        return read_tools(raw)
    except storage.MissingFile:
        raise DataError(f"{origin} does not exist; correct the tools of {source.path}") from None
    except (ValueError, DataError) as err:
        raise DataError(f"{origin}: {err}; write a list of tools as OpenAI's API has them") from None


def pack_chunk(chunk: Chunk, stream: DatasetSpec) -> PackedChunk:
    """Reads, cleans, tokenizes and packs a chunk.

    Raises:
        DataError: The shard changed or cannot be read.
    """
    chat, pad_id = _tokenizer(stream.load_tokenizer, stream.train_on)
    examples: list[Example] = []
    bad: list[Quarantined] = []
    for item in read_examples(chunk, chat, stream.rules(chunk.source)):
        if isinstance(item, Example):
            examples.append(item)
        else:
            bad.append(item)
    sequences, owners = pack_all(examples, stream, pad_id)
    return PackedChunk(sequences, examples, owners, bad)


def pack_all(examples: Sequence[Example], stream: DatasetSpec, pad_id: int) -> tuple[list[PackedSequence], list[int]]:
    """Packs examples as the settings say. Texts that are joined come first.

    Returns:
        The sequences, and for each document in them the index of its example.
    """
    joined = [i for i, e in enumerate(examples) if e.conversation is None] if stream.joins_text else []
    texts = [examples[i].encoded for i in joined]
    pieces = concatenate([len(text.input_ids) for text in texts], stream.max_seq_len)
    documents = [(texts[n].input_ids[a:b], texts[n].loss_mask[a:b]) for sequence in pieces for n, a, b in sequence]
    owners = [joined[n] for sequence in pieces for n, _, _ in sequence]
    ends = list(accumulate(len(sequence) for sequence in pieces))
    sequences = pack_documents(
        documents, [range(e - len(s), e) for s, e in zip(pieces, ends, strict=True)], stream.max_seq_len, pad_id
    )
    whole = set(range(len(examples))).difference(joined)
    others = [(i, document) for i in sorted(whole) for document in examples[i].encoded.documents()]
    packed = pack_examples([document for _, document in others], stream.max_seq_len, pad_id, stream.packing)
    first = len(owners)
    sequences += [replace(p, documents=[first + place for place in p.documents]) for p in packed]
    return sequences, owners + [i for i, _ in others]


@lru_cache(maxsize=2)
def _tokenizer(load: Callable[[], Any], train_on: TrainOn) -> tuple[ChatFormat, int]:
    tokenizer = load()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return ChatFormat(tokenizer, BatchTokenizer(tokenizer, backend_json(tokenizer)), train_on), int(pad or 0)
