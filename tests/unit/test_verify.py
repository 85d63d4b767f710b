"""The proof before training: it holds for what is right, and finds a wrong mask, a cut, a lost piece, a false template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

from ftray import config
from ftray.chat import ChatFormat, Conversation, Encoded, Message
from ftray.data import verify
from ftray.data.chunks import pack_chunk, streams
from ftray.data.index import ChunkFacts, Index
from ftray.data.packing import IGNORE_INDEX, PackedSequence
from ftray.data.record_table import RequiredFields, describe_chunk
from ftray.data.sources import cut_shard, list_shards
from ftray.data.verify_records import Mismatch, verify_document
from ftray.errors import DataError
from tests import tiny
from tests.unit.test_chat import THOUGHTFUL
from tests.unit.test_templates import LLAMA_2, MARKED_LATE, ZEPHYR, sentencepiece


def index_of(path: Path, load: Callable[[], Any]) -> tuple[Any, Index]:
    """Stream and index of a source, without Ray."""
    data = config.DataConfig.model_validate({"max_seq_len": 256, "train": [{"path": str(path)}]})
    stream, _ = streams(data, load)
    facts = []
    for shard in list_shards(str(path)):
        for chunk in cut_shard(shard, 0, 1 << 20):
            packed = pack_chunk(chunk, stream)
            facts.append(ChunkFacts(chunk, len(packed.examples), len(packed.sequences), 0, 0, packed.digest))
    return stream, Index(tuple(facts), ())


def tokenizer_with(template: str) -> Any:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("shape", ["messages", "alpaca", "text"])
def test_it_holds_for_records_of_any_shape(tmp_path: Path, shape: tiny.Shape) -> None:
    path = tiny.write_records(tmp_path / "data", 60, shape=shape)  # in two shards
    assert verify.verify_sample(*index_of(path, tiny.make_tokenizer), "train") == 60
    assert verify.verify_sample(*index_of(path, tiny.make_tokenizer), "train", 7) == 7


@pytest.mark.parametrize("template", [LLAMA_2, ZEPHYR])
@pytest.mark.parametrize(("kind", "scheme"), [("bpe", "prepend"), ("bpe", "first"), ("unigram", "always")])
def test_it_holds_for_tokenizers_that_add_spaces(tmp_path: Path, template: str, kind: str, scheme: str) -> None:
    def load() -> Any:
        tokenizer = sentencepiece(kind, scheme)
        tokenizer.chat_template = template
        return tokenizer

    path = tiny.write_records(tmp_path / "data", 20)
    assert verify.verify_sample(*index_of(path, load), "train") == 20


def test_it_holds_where_the_templates_own_marks_name_less(tmp_path: Path) -> None:
    path = tiny.write_records(tmp_path / "data", 10)
    assert verify.verify_sample(*index_of(path, lambda: tokenizer_with(MARKED_LATE)), "train") == 10


def test_it_holds_where_each_answer_is_a_document_of_its_own(tmp_path: Path) -> None:
    conversations = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} of {n}"} for i in range(2 * n)]}
        for n in (1, 2, 4)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations))
    stream, index = index_of(path, lambda: tokenizer_with(THOUGHTFUL))
    assert verify.verify_sample(stream, index, "train") == 3
    packed = pack_chunk(index.facts[0].chunk, stream)
    assert packed.owners == [0, 1, 1, 2, 2, 2, 2]
    assert sorted(d for row in packed.sequences for d in row.documents) == list(range(7))
    for row in packed.sequences:
        starts = [n for n, position in enumerate(row.position_ids[: row.num_tokens]) if position == 0]
        assert starts == [sum(row.lengths[:n]) for n in range(len(row.documents))]


def shifted(mask: Any, by: int) -> Any:
    return np.roll(np.asarray(mask), by)


def broken(encoded: Encoded, how: str) -> Encoded:
    ids, mask = np.asarray(encoded.input_ids), np.asarray(encoded.loss_mask)
    starts = np.flatnonzero(mask)
    if how == "mask begins early":
        mask = mask.copy()
        mask[starts[0] - 1] = True
    elif how == "mask begins late":
        mask = mask.copy()
        mask[starts[0]] = False
    elif how == "no end token":
        mask = mask.copy()
        mask[starts[-1]] = False
    elif how == "mask has a hole":
        mask = mask.copy()
        mask[starts[1]] = False
    elif how == "cut":
        ids, mask = ids[:-4], mask[:-4]
    elif how == "another token":
        ids = ids.copy()
        ids[starts[0]] += 1
    elif how == "a token is lost before the answer":
        ids, mask = np.delete(ids, 5), np.delete(mask, 5)
    return Encoded(ids, mask)


WRONG = ["mask begins early", "mask begins late", "no end token", "mask has a hole", "cut", "another token"]


@pytest.mark.parametrize("how", [*WRONG, "a token is lost before the answer"])
def test_it_finds_what_is_wrong_and_names_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    stream, index = index_of(tiny.write_records(tmp_path / "data", 9), tiny.make_tokenizer)
    plain = ChatFormat.encode_examples

    def spoiled(self: ChatFormat, conversations: Any) -> Any:
        found = plain(self, conversations)
        found[4] = broken(found[4], how)
        return found

    monkeypatch.setattr(ChatFormat, "encode_examples", spoiled)
    with pytest.raises(DataError, match=r"data\.train: .*part-000\.jsonl, line 5: .* cannot be trained on exactly"):
        verify.verify_sample(stream, index, "train")


@pytest.mark.parametrize("how", [*WRONG, "a token is lost before the answer"])
def test_every_record_is_verified_in_the_index_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    stream, index = index_of(tiny.write_records(tmp_path / "data", 100), tiny.make_tokenizer)
    required = RequiredFields(signatures=False, grams=False, is_eval=False, min_answer_chars=0)
    describe_chunk(index.facts[1].chunk, stream, required)
    plain = ChatFormat.encode_examples

    def spoiled(self: ChatFormat, conversations: Any) -> Any:
        encoded = plain(self, conversations)
        encoded[41] = broken(encoded[41], how)
        return encoded

    monkeypatch.setattr(ChatFormat, "encode_examples", spoiled)
    with pytest.raises(DataError, match=r"part-001\.jsonl, line 42: .* cannot be trained on exactly"):
        describe_chunk(index.facts[1].chunk, stream, required)


def test_it_finds_labels_that_are_not_the_tokens_and_that_cross_documents() -> None:
    ids = np.arange(8, dtype=np.int32)
    labels = np.array([IGNORE_INDEX, 2, 3, IGNORE_INDEX, 5, 6, IGNORE_INDEX, IGNORE_INDEX], dtype=np.int32)
    row = PackedSequence(ids, labels, ids, [4, 3], [0, 1])
    assert [mask for _, _, mask in verify.read_back(row)] == [[False, False, True, True], [False, True, True]]
    crossing = labels.copy()
    crossing[3] = 4
    with pytest.raises(DataError, match="predicts the next document"):
        verify.read_back(replace(row, labels=crossing))
    unshifted = labels.copy()
    unshifted[1] = 1
    with pytest.raises(DataError, match="labels of a sequence are not its tokens"):
        verify.read_back(replace(row, labels=unshifted))


def test_a_record_whose_text_the_template_changes_is_bad(tmp_path: Path) -> None:
    changing = tiny.TEMPLATE.replace("m['content']", "m['content'] | replace('hears', 'sees')")
    stream, index = index_of(tiny.write_records(tmp_path / "data", 3), lambda: tokenizer_with(changing))
    bad = pack_chunk(index.facts[0].chunk, stream).bad
    assert [each.rule for each in bad] == ["bad_turn"] * 3
    assert bad[0].detail.startswith("the chat template leaves out or changes the text of turn 1 (assistant)")


def test_characters_without_a_token_are_no_false_alarm(tmp_path: Path) -> None:
    def load() -> Any:
        tokenizer = sentencepiece("unigram", "always")
        tokenizer.chat_template = ZEPHYR
        return tokenizer

    path = tmp_path / "part.jsonl"
    path.write_text('{"prompt": "日本 one", "completion": "e\\u0301 two"}\n', encoding="utf-8")
    assert verify.verify_sample(*index_of(path, load), "train") == 1


@pytest.mark.parametrize(
    ("begin", "words"), [("one", "end token"), ("<|im_start|>assistant\ntwo", "generation prompt")]
)
def test_a_trained_part_of_more_than_one_answer_is_wrong_even_if_it_was_expected(begin: str, words: str) -> None:
    chat = ChatFormat(tiny.make_tokenizer())
    roles, texts = ("user", "assistant") * 2, ("a", "one", "b", "two")
    conversation = Conversation(tuple(Message(role, text) for role, text in zip(roles, texts, strict=True)))
    ids = [int(i) for i in chat.encode_example(conversation).input_ids]
    text = chat.decode(ids)
    first, stop = text.index(begin), text.rindex("<|im_end|>") + len("<|im_end|>")
    mask = [first <= len(chat.decode(ids[:i])) < stop for i in range(len(ids))]
    (expected,) = chat.expected(conversation)
    assert expected.prompt == "<|im_start|>assistant\n"
    prompt = expected.prompt if words == "generation prompt" else ""
    with pytest.raises(Mismatch, match=words):
        verify_document(chat, replace(expected, trained=[text[first:stop]], prompt=prompt), ids, mask)


def test_a_character_that_the_tokenizer_writes_as_another_one_is_no_false_alarm() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    chat = ChatFormat(tokenizer)
    conversation = Conversation((Message("user", "\u212b \u1100\u1161"), Message("assistant", "5 \u212b")))
    encoded = chat.encode_example(conversation)
    verify_document(chat, chat.expected(conversation)[0], encoded.input_ids, encoded.loss_mask)
