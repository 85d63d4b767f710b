"""Records longer than a sequence are split or truncated between turns, and what is lost is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftray import config
from ftray.chat import ChatFormat, Conversation, Encoded, read_messages
from ftray.data.chunks import DatasetSpec, pack_chunk, streams
from ftray.data.examples import Example, Quarantined, Rules, read_examples
from ftray.data.index import ChunkFacts, Index
from ftray.data.prepare import check_index
from ftray.data.record_table import RequiredFields, describe_chunk, read_described
from ftray.data.sources import Chunk, cut_source, list_shards
from ftray.data.too_long import RecordPart, num_trained, split
from ftray.data.verify import _verify_examples
from ftray.errors import DataError
from tests import tiny
from tests.call_templates import with_template

CHAT = ChatFormat(tiny.make_tokenizer())
LENGTH = 60
NO_FIELDS = RequiredFields(signatures=False, grams=False, is_eval=False, min_answer_chars=0)


def turns(*contents: str, **flags: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)
    ]
    return {"messages": [{"role": "system", "content": "be kind"}, *messages], **flags}


def read(path: Path, record: dict[str, Any], policy: str, **more: Any) -> list[Example | Quarantined]:
    file = path / "data.jsonl"
    file.write_text(json.dumps(record) + "\n")
    rules = Rules(LENGTH, "auto", None, None, None, too_long=policy, **more)
    return [item for c in cut_source(list_shards(str(file)), 0, 1 << 20) for item in read_examples(c, CHAT, rules)]


def trained(examples: list[Any]) -> list[str]:
    pairs = [zip(e.encoded.input_ids, e.encoded.loss_mask, strict=True) for e in examples]
    return [CHAT.decode([int(i) for i, on in pair if on]).replace("<|im_end|>", "|") for pair in pairs]


LONG = turns("q1", "answer one", "q2", "answer two", "q3", "answer three", "q4", "answer four")


def test_a_split_conversation_keeps_every_answer_once_and_each_part_begins_with_its_system_turn(tmp_path: Path) -> None:
    parts = [item for item in read(tmp_path, LONG, "split") if isinstance(item, Example)]
    assert len(parts) >= 2
    assert "".join(trained(parts)) == "answer one|answer two|answer three|answer four|"
    for part in parts:
        assert part.conversation is not None
        assert [m.role for m in part.conversation.messages[:2]] == ["system", "user"]
        assert part.conversation.messages[-1].role == "assistant"
        assert part.encoded.longest <= LENGTH
    assert [part.part for part in parts] == list(range(len(parts)))
    assert {part.num_lost for part in parts} == {0}


def test_a_truncated_conversation_ends_with_an_answer_and_tells_what_is_lost(tmp_path: Path) -> None:
    (part,) = read(tmp_path, LONG, "truncate")
    assert isinstance(part, Example)
    (kept,) = trained([part])
    assert kept
    assert "answer one|answer two|answer three|answer four|".startswith(kept)
    whole = CHAT.encode_examples([part.conversation])[0]  # type: ignore[list-item]
    assert list(whole.input_ids) == list(part.encoded.input_ids)  # type: ignore[union-attr]
    (rest,) = read(tmp_path, {**LONG, "messages": LONG["messages"]}, "truncate")
    assert isinstance(rest, Example)
    all_trained = sum(len(CHAT._plain_ids(f"answer {n}")) + 1 for n in ("one", "two", "three", "four"))
    assert part.num_lost == all_trained - sum(map(bool, part.encoded.loss_mask))
    assert part.num_lost > 0


@pytest.mark.parametrize("policy", ["error", "quarantine", "split", "truncate"])
def test_an_answer_that_does_not_fit_alone_is_quarantined_by_every_policy(tmp_path: Path, policy: str) -> None:
    (bad,) = read(tmp_path, turns("q", "word " * 80), policy)
    assert isinstance(bad, Quarantined)
    assert (bad.rule, "tokens, more than data.max_seq_len (60)" in bad.detail) == ("too_long", True)
    assert bad.detail.endswith("even one question with its answer") == (policy in ("split", "truncate"))


def test_two_answers_in_a_row_are_both_kept(tmp_path: Path) -> None:
    messages = LONG["messages"]
    record = {"messages": [*messages[:3], {"role": "assistant", "content": "once more"}, *messages[3:]]}
    parts = read(tmp_path, record, "split")
    assert "".join(trained(parts)) == "answer one|once more|answer two|answer three|answer four|"


def agent(*calls: str, question: str = "look up all of them") -> list[dict[str, Any]]:
    """A round of an agent: a question, calls with their results, and an answer."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for call in calls:
        turns.append({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": call}}]})
        turns.append({"role": "tool", "content": f"result of {call}"})
    return [*turns, {"role": "assistant", "content": "the end"}]


def calling_chat() -> ChatFormat:
    return ChatFormat(with_template(tiny.make_tokenizer(), "hermes"))


def split_agent(messages: list[dict[str, Any]], max_seq_len: int) -> tuple[list[RecordPart], int]:
    """The parts of a record, and the trained tokens that are in none."""
    chat, conversation = calling_chat(), Conversation(read_messages(messages))
    (encoded,) = chat.encode_examples([conversation])
    assert isinstance(encoded, Encoded)
    parts = split(conversation, encoded, chat, max_seq_len)
    for part in parts:
        assert part.encoded.longest <= max_seq_len
    return parts, num_trained(encoded) - sum(num_trained(part.encoded) for part in parts)


def outline(part: RecordPart) -> list[str]:
    """Its turns by the first letter of their role, and the argument of a call; an answer that is trained on is a capital."""
    assert isinstance(part.content, Conversation)
    names = []
    for turn in part.content.messages:
        name = turn.role[0] + "".join(str(call.arguments["a"])[:1] for call in turn.tool_calls)
        names.append(name.upper() if turn.role == "assistant" and turn.train else name)
    return names


def test_a_split_agent_repeats_its_question_and_the_call_of_a_result_but_trains_on_each_answer_once() -> None:
    messages = [{"role": "system", "content": "be kind"}, *agent("one one", "two two", "seven", "four")]
    parts, lost = split_agent(messages, 210)
    assert [" ".join(outline(part)) for part in parts] == ["s u AO t AT", "s u at t AS", "s u as t AF", "s u af t A"]
    assert lost == 0


def test_a_split_conversation_of_agents_is_cut_before_a_question_where_it_can() -> None:
    messages = [*agent("one"), *agent("two", "three"), *agent("four")]
    parts, lost = split_agent(messages, 220)
    assert [" ".join(outline(part)) for part in parts] == ["u AO t A", "u AT t AT t A", "u AF t A"]
    assert lost == 0


def test_what_fits_in_no_part_is_lost_and_counted_and_the_other_answers_are_kept() -> None:
    messages = [*agent("one", "two " * 50, "three"), *agent("four")]
    parts, lost = split_agent(messages, 130)
    kept = [" ".join(outline(part)) for part in parts]
    assert kept == ["u AO", "u at t A", "u AF t A"]
    long_call, after_it = calling_chat().encode_examples(
        [Conversation(read_messages(each)) for each in (messages[:4], messages[:6])]
    )
    assert isinstance(long_call, Encoded)
    assert isinstance(after_it, Encoded)
    (first,) = calling_chat().encode_examples([Conversation(read_messages(messages[:2]))])
    assert isinstance(first, Encoded)
    assert lost == num_trained(after_it) - num_trained(first)


def test_a_split_text_has_all_of_its_tokens_and_a_truncated_one_the_first(tmp_path: Path) -> None:
    text = "A cow says moo é🙂. " * 20
    whole = list(CHAT.encode_text(text).input_ids)
    parts = read(tmp_path, {"text": text}, "split")
    assert [t for p in parts for t in p.encoded.input_ids] == whole  # type: ignore[union-attr]
    assert [p.is_cut for p in parts] == [True] * (len(parts) - 1) + [False]  # type: ignore[union-attr]
    (first,) = read(tmp_path, {"text": text}, "truncate")
    assert isinstance(first, Example)
    assert list(first.encoded.input_ids) == whole[:LENGTH]
    assert first.num_lost == len(whole) - LENGTH


def test_a_fractional_weight_is_rejected_by_name(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}
    (bad,) = read(tmp_path, record, "error")
    assert isinstance(bad, Quarantined)
    assert (bad.rule, bad.detail) == (
        "fractional_weight",
        "turn 1 (assistant) has the weight 0.5; only 0 and 1 are supported",
    )


def stream_of(path: Path, **data: Any) -> DatasetSpec:
    section = config.DataConfig(max_seq_len=LENGTH, train=[config.SourceConfig(path=str(path))], **data)
    return streams(section, tiny.make_tokenizer)[0]


def test_the_index_counts_what_was_shortened_and_verifies_the_parts(tmp_path: Path) -> None:
    lines = [LONG, turns("q", "a"), {"text": "moo " * 100}, {"text": "short"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (chunk,) = cut_source(list_shards(str(tmp_path)), 0, 1 << 20)
    for policy in ("split", "truncate"):
        summary = read_described(describe_chunk(chunk, stream_of(tmp_path, too_long=policy), NO_FIELDS))[0].summary
        assert (summary.num_records, summary.bad) == (4, [])
        assert summary.shortened["records"] == 2
        assert summary.shortened["examples"] > 2 if policy == "split" else summary.shortened["examples"] == 2
        # a text's tokens are predicted from the ones before, so each cut costs the first token after it
        assert summary.shortened["lost"] == 1 if policy == "split" else summary.shortened["lost"] > 30


def test_joined_texts_fill_sequences_without_gaps_and_lose_no_token(tmp_path: Path) -> None:
    texts = [f"A cow of farm {n} says moo. " * (n % 7 + 1) for n in range(40)]
    records = [{"text": text} for text in texts] + [turns("q", "a"), turns("r", "b")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (chunk,) = cut_source(list_shards(str(tmp_path)), 0, 1 << 20)
    packed = pack_chunk(chunk, stream_of(tmp_path, pack_text="concatenate"))
    assert packed.bad == []
    _verify_examples(CHAT, packed.examples, stream_of(tmp_path, pack_text="concatenate"), chunk, "train")
    whole = [int(t) for text in texts for t in CHAT.encode_text(text).input_ids]
    num_full, rest = divmod(len(whole), LENGTH)
    assert [s.num_tokens for s in packed.sequences[: num_full + 1]] == [LENGTH] * num_full + [rest]
    assert [int(t) for s in packed.sequences[: num_full + 1] for t in s.input_ids[: s.num_tokens]] == whole
    assert len(packed.sequences) == num_full + 2  # the conversations have one of their own
    owners = [packed.owners[d] for s in packed.sequences for d in s.documents]
    assert owners == sorted(owners)
    assert set(owners) == set(range(42))
    for sequence in packed.sequences:  # no document, and no piece of one, predicts into the next
        starts = [sum(sequence.lengths[:i]) for i in range(len(sequence.lengths))]
        assert [int(sequence.position_ids[start]) for start in starts] == [0] * len(starts)
        assert all(int(sequence.labels[start - 1]) == -100 for start in starts[1:])


def test_a_quarantined_long_record_does_not_count_against_the_limit(tmp_path: Path) -> None:
    entry = Quarantined("x.jsonl", 0, "too_long", "70 tokens", "")
    facts = ChunkFacts(Chunk(0, "x.jsonl", "x.jsonl", "e", 0, 1), 1, 1, 10, 5, "d")
    for policy in ("error", "quarantine"):
        stream = stream_of(tmp_path, too_long=policy)
        other = replace(entry, rule="no_answer")
        if policy == "quarantine":
            check_index(Index((facts,), (entry, entry)), stream, "train", 0, str(tmp_path))
        with pytest.raises(
            DataError, match=r"1 bad record \(1 no_answer\)" if policy == "quarantine" else "3 bad records"
        ):
            check_index(Index((facts,), (entry, other, entry)), stream, "train", 0, str(tmp_path))
