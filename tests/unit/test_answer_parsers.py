"""Answers are read back as reasoning, content and calls, whole or character by character, in every family's form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ftray.chat.messages import ToolCall
from ftray.chat.parsers.answer import Answer, AnswerParser, AnswerParts, AnswerSyntax, MarkedAnswer, parse_answer
from ftray.chat.parsers.harmony import Harmony
from ftray.chat.parsers.probe import SYNTAXES
from ftray.chat.parsers.xml_calls import typed_value

PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
THINK = ("<think>", "</think>")


def syntax(name: str, reasoning: tuple[str, str] | None = None) -> AnswerSyntax:
    return Harmony() if name == "harmony" else MarkedAnswer(next(s for s in SYNTAXES if s.name == name), reasoning)


def by_character(text: str, how: AnswerSyntax, in_reasoning: bool = False) -> Answer:
    parser, parts = AnswerParser(how, TOOLS, in_reasoning=in_reasoning), AnswerParts()
    for character in text:
        parts.add(parser.push(character))
    parts.add(parser.finish())
    calls = tuple(ToolCall(name, json.loads(arguments)) for name, arguments in parts.calls)
    return Answer(parts.content, parts.reasoning, calls)


F, G = ToolCall("f", {"a": 'x}"y', "b": 3}), ToolCall("g", {})
CASES = [
    (
        "hermes",
        (
            'Let me.\n<tool_call>\n{"name": "f", "arguments": {"a": "x}\\"y", "b": 3}}\n</tool_call>\n'
            '<tool_call>\n{"arguments": {}, "name": "g"}\n</tool_call>'
        ),
        Answer("Let me.", calls=(F, G)),
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"b\\": 1}"}', Answer(calls=(ToolCall("f", {"b": 1}),))),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "g", "n": 1}}</tool_call>', Answer(calls=(G,))),
    ("hermes", "2 < 3 and <tool> is text \n", Answer("2 < 3 and <tool> is text \n")),
    ("hermes", "<tool_call>\nno call</tool_call> tail", Answer("<tool_call>\nno call</tool_call> tail")),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', Answer('<tool_call>{"name": 5}</tool_call>')),
    (
        "qwen3_xml",
        (
            'hi\n\n<tool_call>\n<function=f>\n<parameter=a>\n x "y"\nz\n\n</parameter>\n<parameter=b>\n3\n</parameter>\n'
            "</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>"
        ),
        Answer("hi", calls=(ToolCall("f", {"a": ' x "y"\nz\n', "b": 3}), G)),
    ),
    ("qwen3_xml", "<tool_call>\n{}\n</tool_call>", Answer("<tool_call>\n{}\n</tool_call>")),
    (
        "glm4",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>5</arg_value>\n<arg_key>b</arg_key><arg_value>5</arg_value></tool_call>",
        Answer(calls=(ToolCall("f", {"a": "5", "b": 5}),)),
    ),
    ("llama3_json", '{"name": "f", "parameters": {"a": "x"}}', Answer(calls=(ToolCall("f", {"a": "x"}),))),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"b": 1}}',
        Answer(calls=(ToolCall("f", {}), ToolCall("f", {"b": 1}))),
    ),
    ("llama3_json", ' {"name": "zz", "parameters": {}} a', Answer(' {"name": "zz", "parameters": {}} a')),
    ("llama3_json", '{"name": "f"}', Answer('{"name": "f"}')),
    (
        "mistral_args",
        'ok[TOOL_CALLS]f[ARGS]{"b": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}',
        Answer("ok", calls=(ToolCall("f", {"b": 1}), G)),
    ),
    (
        "mistral_list",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"b": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}, "n": -5.2}]',
        Answer(calls=(ToolCall("f", {"b": 1}), G)),
    ),
    ("granite", '<|tool_call|>[{"name": "g", "arguments": {}}]', Answer(calls=(G,))),
    ("nemotron", '<TOOLCALL>[{"name": "g", "arguments": {}}]</TOOLCALL>', Answer(calls=(G,))),
    (
        "deepseek",
        (
            'x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"b": 1}\n```<｜tool▁call▁end｜>\n'
            "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        Answer("x", calls=(ToolCall("f", {"b": 1}), G)),
    ),
    (
        "kimi_k2",
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.g:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>"
        ),
        Answer(calls=(G,)),
    ),
    (
        "harmony",
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>"
            '{"b": 1}<|call|>'
        ),
        Answer(reasoning="hm", calls=(ToolCall("f", {"b": 1}),)),
    ),
    (
        "harmony",
        "<|channel|>commentary to=functions.g <|constrain|>json<|message|>{}",
        Answer(calls=(G,)),
    ),
    ("harmony", "<|channel|>final<|message|>yes\n", Answer("yes\n")),
    ("harmony", "no channel", Answer("no channel")),
    ("harmony", "<|channel|>commentary to=functions.g<|message|><|call|>", Answer(calls=(G,))),
    (
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>fin",
        Answer(reasoning="hm"),
    ),
    ("harmony", "<|channel|>final<|message|>yes<|end|>no<|start|>assistant", Answer("yesno")),
    ("harmony", " to=functions.f<|channel|>comm", Answer()),
    ("hermes", "Use the <tool_call> tag", Answer("Use the <tool_call> tag")),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"b": 1}, "arguments": {"b": 2}, "parameters": "{}"}</tool_call>',
        Answer(calls=(ToolCall("f", {"b": 1}),)),
    ),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_an_answer_is_read_alike_whole_and_by_character(name: str, text: str, expected: Answer) -> None:
    assert parse_answer(text, syntax(name), TOOLS) == expected
    assert by_character(text, syntax(name)) == expected


@pytest.mark.parametrize(
    ("text", "in_reasoning", "expected"),
    [
        ("<think>\nhm\n\nso\n</think>\n\nyes", False, Answer("yes", "hm\n\nso")),
        ("hm\n</think>\n\nyes", True, Answer("yes", "hm")),
        ("\n</think>\n\nyes", True, Answer("yes")),
        ('<think>\nhm</think>\n\n<tool_call>{"name": "g"}</tool_call>', False, Answer("", "hm", (G,))),
        ("<think>cut of", False, Answer("", "cut of")),
        (" no <think>x</think>", False, Answer(" no <think>x</think>")),
    ],
)
def test_reasoning_is_apart_from_content(text: str, in_reasoning: bool, expected: Answer) -> None:
    how = syntax("hermes", THINK)
    assert parse_answer(text, how, TOOLS, in_reasoning=in_reasoning) == expected
    assert by_character(text, how, in_reasoning) == expected


@pytest.mark.parametrize("name", ["hermes", "qwen3_xml", "mistral_args", "deepseek", "harmony"])
def test_the_arguments_of_a_call_are_passed_on_while_they_are_generated(name: str) -> None:
    text, call = next((text, answer.calls[0]) for case, text, answer in CASES if case == name and answer.calls)
    parser = AnswerParser(syntax(name), TOOLS)
    deltas = [delta for character in text for delta in parser.push(character)]
    pieces = [delta.text for delta in deltas if delta.kind == "arguments" and delta.call == 0]
    assert next(delta.text for delta in deltas if delta.kind == "call") == call.name
    assert len(pieces) >= len(json.dumps(call.arguments)) // 2


@pytest.mark.parametrize("name", [s.name for s in SYNTAXES] + ["harmony"])
def test_without_tools_nothing_is_a_call(name: str) -> None:
    for case, text, _ in CASES:
        if case == name and name != "harmony":
            parser = AnswerParser(syntax(name), reads_calls=False)
            deltas = [*parser.push(text), *parser.finish()]
            assert "".join(delta.text for delta in deltas) == text
            assert {delta.kind for delta in deltas} <= {"content"}


def test_an_answer_that_is_cut_off_in_a_call_keeps_what_there_is() -> None:
    parser = AnswerParser(syntax("hermes"), TOOLS)
    parts = AnswerParts()
    parts.add([*parser.push('<tool_call>{"name": "f", "arguments": {"a": "x'), *parser.finish()])
    assert parts.calls == [("f", '{"a": "x')]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5", {}, 5),
        ("five", {"type": "integer"}, "five"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "null"),
        ("True", {"type": "boolean"}, True),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("C", {"enum": ["C", "F"]}, "C"),
        ('"x"', None, '"x"'),
        ("NaN", {}, "NaN"),
        ("[1e999]", {"type": "array"}, "[1e999]"),
    ],
)
def test_a_value_between_tags_has_the_type_of_its_schema(text: str, schema: Any, value: Any) -> None:
    assert typed_value(text, schema) == value
