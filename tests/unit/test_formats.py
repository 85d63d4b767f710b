"""A record of any known shape becomes the same conversation; any other says which rule it breaks."""

from typing import Any

import pytest

from ftray.chat import Conversation, Message
from ftray.data.formats import BadRecord, read_record


def talk(*messages: Message) -> Conversation:
    return Conversation(messages)


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
    assert (
        read_record({**record, "id": 7, "source": {"x": 1}}, "auto", None) == conversation
    )  # other keys are left alone


def test_columns_name_whose_turn_is_where() -> None:
    record = {"question": "q", "answer": "a", "context": "s", "messages": 3}
    assert read_record(record, "auto", {"user": "question", "assistant": "answer"}) == ASKED
    columns = {"system": "context", "user": "question", "assistant": "answer"}
    assert read_record(record, "columns", columns) == talk(Message("system", "s"), *ASKED.messages)


@pytest.mark.parametrize(("name", "record", "conversation"), GOOD)
def test_a_system_text_beside_the_turns_is_their_first(name: str, record: dict[str, Any], conversation: object) -> None:
    found = read_record({**record, "system": "be kind"}, name, None)
    if name == "text":
        assert found == conversation
    else:
        assert isinstance(conversation, Conversation)
        assert found == talk(Message("system", "be kind"), *conversation.messages)
    assert read_record({**record, "system": ""}, name, None) == conversation


@pytest.mark.parametrize("key", ["history", "tools", "functions"])
def test_what_would_be_lost_is_refused_by_name(key: str) -> None:
    record = {"instruction": "q", "output": "a", key: [["x", "y"]]}
    with pytest.raises(BadRecord, match=f"it has {key}, which is not supported") as caught:
        read_record(record, "auto", None)
    assert caught.value.rule == "lost_field"
    assert read_record({**record, key: []}, "auto", None) == ASKED


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
    ("bad_turn", "messages must be a list with at least one turn", {"messages": None}),
    ("bad_turn", "messages must be a list with at least one turn", {"messages": []}),
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
    ("bad_turn", "conversations must be a list", {"conversations": "q"}),
    ("bad_turn", "messages must be a list with at least one turn", {"conversations": []}),
    ("bad_turn", "turn 0 has the role 'bot'", {"conversations": [{"from": "bot", "value": "q"}]}),
    ("bad_turn", "turn 0 has the role ['x']", {"conversations": [{"from": ["x"], "value": "q"}]}),
    ("bad_turn", "turn 0 must be an object", {"conversations": ["q"]}),
    ("bad_turn", "turn 0 (user) has no text", {"conversations": [{"from": "human"}]}),
    ("missing_field", "prompt is missing", {"prompt": None, "completion": "a"}),
    ("missing_field", "prompt is empty", {"prompt": " ", "completion": "a"}),
    ("wrong_type", "prompt is of type list, not a string", {"prompt": ["q"], "completion": "a"}),
    ("no_answer", "completion is missing or empty", {"prompt": "q"}),
    ("no_answer", "completion is missing or empty", {"prompt": "q", "completion": "\n"}),
    ("wrong_type", "completion is of type int, not a string", {"prompt": "q", "completion": 3}),
    ("no_answer", "output is missing or empty", {"instruction": "q", "output": None}),
    ("wrong_type", "input is of type dict, not a string", {"instruction": "q", "input": {"x": 1}, "output": "a"}),
    ("missing_field", "text is empty", {"text": ""}),
    ("wrong_type", "text is of type bool, not a string", {"text": True}),
]


@pytest.mark.parametrize(("rule", "words", "record"), BAD)
def test_any_other_record_names_the_rule_and_the_place(rule: str, words: str, record: dict[str, Any]) -> None:
    with pytest.raises(BadRecord) as caught:
        read_record(record, "auto", None)
    assert caught.value.rule == rule
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("name", ["messages", "sharegpt", "prompt-completion", "alpaca", "text"])
def test_a_record_of_another_shape_than_the_named_one_is_bad(name: str) -> None:
    record = {"prompt": "q", "completion": "a"} if name != "prompt-completion" else {"text": "t"}
    with pytest.raises(BadRecord):
        read_record(record, name, None)


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(BadRecord, match="answer is missing or empty"):
        read_record({"question": "q"}, "columns", {"user": "question", "assistant": "answer"})
    with pytest.raises(BadRecord, match="question is missing"):
        read_record({"answer": "a"}, "columns", {"user": "question", "assistant": "answer"})
