"""A record of any known shape becomes the same conversation; any other says which rule it breaks."""

from typing import Any

import pytest

from ftray.chat import Conversation, Message
from ftray.data.examples import parse_record
from ftray.data.formats import BadRecord, read_record
from ftray.data.sources import RawRecord


def talk(*messages: Message) -> Conversation:
    return Conversation(messages)


def rejects(record: dict[str, Any], rule: str, words: str, **more: Any) -> None:
    with pytest.raises(BadRecord) as caught:
        read_record(record, more.pop("format", "auto"), more.pop("columns", None), **more)
    assert (caught.value.rule, str(caught.value)[: len(words)]) == (rule, words)


ASKED = talk(Message("user", "q"), Message("assistant", "a"))
LONGER = talk(
    Message("system", "s"),
    Message("user", "q"),
    Message("assistant", "a"),
    Message("user", "r"),
    Message("assistant", "b"),
)

GOOD: list[tuple[str, dict[str, Any], object]] = [
    ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ASKED),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "assistant", "value": "a"},
                {"from": "human", "value": "r"},
                {"from": "gpt", "value": "b"},
            ]
        },
        LONGER,
    ),
    ("prompt-completion", {"prompt": "q", "completion": "a"}, ASKED),
    ("alpaca", {"instruction": "q", "output": "a"}, ASKED),
    ("alpaca", {"instruction": "q", "input": None, "output": "a"}, ASKED),
    ("alpaca", {"instruction": "q", "input": " \n", "output": "a"}, ASKED),
    (
        "alpaca",
        {"instruction": "q", "input": "i", "output": "a"},
        talk(Message("user", "q\n\ni"), Message("assistant", "a")),
    ),
    ("text", {"text": " once\n"}, " once\n"),
]


@pytest.mark.parametrize(("name", "record", "conversation"), GOOD)
def test_each_shape_is_read_named_or_found_by_looking(name: str, record: dict[str, Any], conversation: object) -> None:
    assert read_record(record, name, None) == conversation
    assert read_record(record, "auto", None) == conversation
    assert read_record({**record, "id": 7, "source": {"x": 1}}, "auto", None) == conversation  # facts about the record


def test_columns_name_whose_turn_is_where() -> None:
    record = {"question": "q", "answer": "a", "context": "s", "messages": 3}
    assert read_record(record, "auto", {"user": "question", "assistant": "answer"}) == ASKED
    columns = {"system": "context", "user": "question", "assistant": "answer"}
    assert read_record(record, "columns", columns) == talk(Message("system", "s"), *ASKED.messages)


@pytest.mark.parametrize(("name", "record", "conversation"), GOOD)
def test_a_system_text_beside_the_turns_is_their_first(name: str, record: dict[str, Any], conversation: object) -> None:
    assert read_record({**record, "system": ""}, name, None) == conversation
    if name == "text":
        rejects(
            {**record, "system": "be kind"},
            "unused_key:system",
            "it has the key system, which has no effect in this format",
        )
        return
    assert isinstance(conversation, Conversation)
    if conversation.messages[0].role == "system":
        words = "it has the key system and a system turn with another text; keep one of them"
        rejects({**record, "system": "be kind"}, "bad_turn", words)
        assert read_record({**record, "system": "s\n"}, name, None) == conversation
    else:
        found = read_record({**record, "system": "be kind"}, name, None)
        assert found == talk(Message("system", "be kind"), *conversation.messages)


def test_texts_are_taken_as_they_are() -> None:
    text = "  a\r\n\tb  "
    assert read_record({"prompt": text, "completion": text}, "auto", None) == talk(
        Message("user", text),
        Message("assistant", text),
    )


def turn(role: object = "user", content: object = "q", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


BAD: list[tuple[str, str, dict[str, Any]]] = [
    (
        "unknown_shape",
        "its keys (a, b) match no known format; give the source columns: {user: …, assistant: …}",
        {"b": 1, "a": 2},
    ),
    ("unknown_shape", "its keys (none) match no known format", {}),
    ("missing_field", "it has none of the keys messages, conversations, conversation", {"messages": None}),
    ("bad_turn", "messages must be a list of turns", {"messages": {"a": 1}}),
    ("bad_turn", "turn 0 must be an object with role and content", {"messages": ["q"]}),
    (
        "bad_turn",
        "turn 0 has the role 'bot'; use one of system, developer, user, assistant, tool",
        {"messages": [turn("bot")]},
    ),
    (
        "bad_turn",
        "turn 0 (user): content must be a string or a list of text parts, not a number",
        {"messages": [turn(content=3)]},
    ),
    ("no_answer", "no turn is the assistant's", {"messages": [turn()]}),
    ("bad_turn", "conversations must be a list of turns", {"conversations": "q"}),
    ("missing_field", "it has none of the keys messages", {"conversations": []}),
    ("bad_turn", "turn 0 has the role 'bot'", {"conversations": [{"from": "bot", "value": "q"}]}),
    ("bad_turn", "turn 0 has the role ['x']", {"conversations": [{"from": ["x"], "value": "q"}]}),
    ("bad_turn", "turn 0 must be an object", {"conversations": ["q"]}),
    ("bad_turn", "turn 0 (user) has no text", {"conversations": [{"from": "human"}]}),
    ("missing_field", "prompt is missing", {"prompt": None, "completion": "a"}),
    ("missing_field", "prompt is empty", {"prompt": " ", "completion": "a"}),
    ("bad_turn", "turn 0 must be an object", {"prompt": ["q"], "completion": "a"}),
    ("no_answer", "completion is missing; the record has prompt", {"prompt": "q"}),
    ("no_answer", "completion is empty", {"prompt": "q", "completion": "\n"}),
    ("wrong_type", "completion is of type int, not a string", {"prompt": "q", "completion": 3}),
    ("no_answer", "output is empty", {"instruction": "q", "output": None}),
    ("wrong_type", "input is of type dict, not a string", {"instruction": "q", "input": {"x": 1}, "output": "a"}),
    ("missing_field", "text is empty", {"text": ""}),
    ("wrong_type", "text is of type bool, not a string", {"text": True}),
]


@pytest.mark.parametrize(("rule", "words", "record"), BAD)
def test_any_other_record_names_the_rule_and_the_place(rule: str, words: str, record: dict[str, Any]) -> None:
    rejects(record, rule, words)


@pytest.mark.parametrize("name", ["messages", "sharegpt", "prompt-completion", "alpaca", "text"])
def test_a_record_of_another_shape_than_the_named_one_is_bad(name: str) -> None:
    record = {"prompt": "q", "completion": "a"} if name != "prompt-completion" else {"text": "t"}
    with pytest.raises(BadRecord):
        read_record(record, name, None)


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    columns = {"user": "question", "assistant": "answer"}
    rejects({"question": "q"}, "no_answer", "answer is missing; the record has question", columns=columns)
    rejects({"answer": "a"}, "missing_field", "question is missing; the record has answer", columns=columns)
    rejects({"question": None, "answer": "a"}, "missing_field", "question is missing", columns=columns)
    columns = {**columns, "system": "rulez"}
    words = "rulez is missing; the record has answer, question, rules"
    rejects({"question": "q", "answer": "a", "rules": "s"}, "missing_field", words, columns=columns)


@pytest.mark.parametrize(
    ("columns", "record", "wanted"),
    [
        ({"user": "{i}[\n\n{c}]", "assistant": "r"}, {"i": "q", "c": "x", "r": "a"}, ("q\n\nx", "a")),
        ({"user": "{i}[\n\n{c}]", "assistant": "r"}, {"i": "q", "c": " ", "r": "a"}, ("q", "a")),
        ({"user": "{i}[\n\n{c}]", "assistant": "r"}, {"i": "q", "r": "a"}, ("q", "a")),
        ({"user": "[{c}\n]{i} [[1]] {{x}}", "assistant": "{r}."}, {"i": "q", "c": None, "r": "a"}, ("q [1] {x}", "a.")),
        ({"user": "i", "assistant": "n"}, {"i": "q", "n": 3}, ("q", "3")),
        ({"user": "i", "assistant": "r", "system": "s"}, {"i": "q", "r": "a", "s": ""}, ("q", "a")),
        ({"user": "i", "assistant": "r", "system": "s"}, {"i": "q", "r": "a", "s": None}, ("q", "a")),
        ({"user": "i", "assistant": "r", "system": "s"}, {"i": "q", "r": "a", "s": "be"}, ("be", "q", "a")),
        ({"user": "i", "assistant": "r", "system": "[Rules: {s}]"}, {"i": "q", "r": "a"}, ("q", "a")),
    ],
)
def test_columns_may_join_fields_and_leave_out_empty_ones(
    columns: dict[str, str], record: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    conversation = read_record(record, "columns", columns)
    assert isinstance(conversation, Conversation)
    assert tuple(m.content for m in conversation.messages) == wanted
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant"][-len(wanted) :]


def test_columns_may_name_turns_and_tools() -> None:
    record = {"dialog": GOOD[0][1]["messages"], "api": '[{"name": "f"}]', "score": 1}
    found = read_record(record, "auto", {"messages": "dialog", "tools": "api"})
    assert found == Conversation(ASKED.messages, ({"type": "function", "function": {"name": "f"}},))


TOOLS = ({"type": "function", "function": {"name": "f"}},)


def test_tools_are_the_records_own_or_the_sources() -> None:
    record = GOOD[0][1]
    for own, wanted in [
        ({}, TOOLS),
        ({"tools": None}, TOOLS),
        ({"tools": []}, ()),
        ({"tools": "[]"}, ()),
        ({"tools": "null"}, TOOLS),
        ({"tools": ""}, TOOLS),
        ({"tools": " ", "functions": "null"}, TOOLS),
        ({"tools": "[]", "functions": None}, ()),
        ({"functions": [{"name": "g"}]}, ({"type": "function", "function": {"name": "g"}},)),
    ]:
        assert read_record({**record, **own}, "auto", None, tools=TOOLS) == Conversation(ASKED.messages, wanted), own
    rejects({"text": "t"}, "wrong_type", "it is plain text, but its source has tools", tools=TOOLS)
    rejects({**record, "tools": 3}, "bad_tools", "tools must be a list of functions, not a number")
    both = {**record, "tools": [{"name": "g"}], "functions": [{"name": "h"}]}
    rejects(both, "bad_tools", "it has both tools and functions; remove one of them")


def test_earlier_turns_as_pairs_come_first() -> None:
    record = {"instruction": "r", "output": "b", "system": "s", "history": [["q", "a"]]}
    assert read_record(record, "auto", None) == LONGER
    assert read_record({**record, "history": '[["q", "a"]]'}, "auto", None) == LONGER
    assert read_record({"query": "r", "response": "b", "system": "s", "history": [["q", "a"]]}, "auto", None) == LONGER
    rejects({**record, "history": [["q"]]}, "wrong_type", "history must be a list of pairs [question, answer]")
    rejects({**record, "history": "q"}, "wrong_type", "history must be a list of pairs")
    rejects(
        {"messages": GOOD[0][1]["messages"], "history": [["q", "a"]]}, "unused_key:history", "it has the key history"
    )


def test_prompt_and_completion_may_be_turns_of_which_only_the_completion_is_trained_on() -> None:
    prompt = [turn("user", "q"), turn("assistant", "a"), turn("user", "r")]
    context = (Message("user", "q"), Message("assistant", "a", train=False), Message("user", "r"))
    found = read_record({"prompt": prompt, "completion": [turn("assistant", "b")]}, "auto", None)
    assert found == talk(*context, Message("assistant", "b"))
    assert read_record({"prompt": prompt, "completion": "b"}, "auto", None) == found
    rejects({"prompt": prompt, "completion": [turn("user", "b")]}, "no_answer", "no turn is the assistant's")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("images", ["a.jpg"], "it has the key images, but ftray trains on text only"),
        ("audio", "a.wav", "it has the key audio, but ftray trains on text only"),
        ("rejected", "x", "it has the key rejected, but ftray trains on answers, not on preferences"),
        ("chosen", [turn()], "it has the key chosen, but ftray trains on answers, not on preferences"),
        ("label", False, "it has the key label, which rates or classifies it; remove records with bad answers"),
        ("score", 0.5, "it has the key score, which has no effect in this format"),
        ("weight", 0, "it has the key weight, which has no effect in this format"),
        ("text", "t", "it has the key text, which has no effect in this format"),
    ],
)
def test_a_key_without_effect_is_rejected_by_name_unless_the_source_ignores_it(
    key: str, value: object, words: str
) -> None:
    record = {**GOOD[0][1], key: value}
    rejects(record, f"unused_key:{key}", words)
    assert read_record(record, "auto", None, ignore={key}) == ASKED
    assert read_record(record, "auto", None, used_elsewhere={key}) == ASKED
    assert read_record({**record, key: None}, "auto", None) == ASKED


def test_ignored_keys_are_left_out_of_turns_too() -> None:
    record = {"messages": [turn(), turn("assistant", "a", score=3)]}
    rejects(record, "bad_turn", "turn 1 (assistant) has the key score, which is not supported")
    assert read_record(record, "auto", None, ignore={"score"}) == ASKED


def test_a_prompt_that_repeats_the_first_question_is_not_lost() -> None:
    record = {**GOOD[0][1], "prompt": "q", "prompt_id": "1"}
    assert read_record(record, "auto", None) == ASKED
    rejects({**record, "prompt": "other"}, "unused_key:prompt", "it has the key prompt")
    assert read_record({**GOOD[0][1], "conversations": GOOD[0][1]["messages"]}, "auto", None) == ASKED
    rejects({**GOOD[0][1], "conversations": [turn()]}, "unused_key:conversations", "it has the key conversations")


def test_question_and_answer_in_one_item_are_in_this_order_whatever_the_order_of_their_keys() -> None:
    record = {"conversation": [{"assistant": "a", "human": "q"}, {"human": "r", "assistant": "b"}], "system": "s"}
    assert read_record(record, "auto", None) == LONGER


def test_a_prompt_or_completion_that_holds_turns_as_json_is_read_as_turns() -> None:
    prompt, completion = '[{"role": "user", "content": "q"}]', '[{"from": "gpt", "value": "a"}]'
    assert read_record({"prompt": prompt, "completion": completion}, "auto", None) == ASKED
    for text in ('["red", "blue"]', '[{"name": "x"}]', "[1", "[]"):  # an answer may be a list of something else
        assert read_record({"prompt": "q", "completion": text}, "auto", None) == talk(
            Message("user", "q"), Message("assistant", text)
        )


def test_a_key_that_occurs_twice_in_the_json_of_a_turn_is_refused() -> None:
    turns = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "good", "content": "bad"}]'
    rejects({"messages": turns}, "repeated_key", "the key 'content' occurs twice in an object")


def test_a_user_text_that_is_empty_is_refused() -> None:
    rejects(
        {"q": "q", "a": "a"},
        "missing_field",
        "the user text is empty: '[{question}]' names no column with a text",
        columns={"user": "[{question}]", "assistant": "a"},
    )


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"prompt": "q", "completion": "good", "completion": "bad"}', "completion"),
        ('{"messages": [{"role": "assistant", "content": "a", "train": false, "train": true}]}', "train"),
    ],
)
def test_a_key_that_occurs_twice_in_a_record_is_refused(line: str, key: str) -> None:
    with pytest.raises(BadRecord, match=f"^the key '{key}' occurs twice in an object$") as caught:
        parse_record(RawRecord(0, line.encode()))
    assert caught.value.rule == "repeated_key"
