"""Finds out how a chat template writes answers, by rendering answers that are known and reading them back.

No model's name is looked at: the syntax of a template is the one whose parser reads exactly the calls that were rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftray.chat.messages import Conversation, Message, ToolCall
from ftray.chat.parsers.answer import Answer, AnswerSyntax, CallSyntax, MarkedAnswer, parse_answer
from ftray.chat.parsers.harmony import Harmony
from ftray.chat.parsers.json_calls import LlamaJson, MistralArgs, SectionedJson, TaggedJson
from ftray.chat.parsers.shape import CONTENT, REASONING, AnswerShape, Write, find_shape
from ftray.chat.parsers.xml_calls import XmlCalls
from ftray.errors import DataError

if TYPE_CHECKING:
    from ftray.chat.encode import ChatFormat

SYNTAXES: tuple[CallSyntax, ...] = (
    TaggedJson("hermes", "<tool_call>", "</tool_call>"),
    XmlCalls(
        "qwen3_xml",
        head=("<tool_call>", "<function="),
        head_end=">",
        key=("<parameter=", ">"),
        value=("", "</parameter>"),
        foot=("</function>", "</tool_call>"),
        on_own_lines=True,
    ),
    XmlCalls(
        "glm4",
        head=("<tool_call>",),
        head_end="",
        key=("<arg_key>", "</arg_key>"),
        value=("<arg_value>", "</arg_value>"),
        foot=("</tool_call>",),
    ),
    MistralArgs(),
    TaggedJson("mistral_list", "[TOOL_CALLS]"),
    TaggedJson("granite", "<|tool_call|>"),
    TaggedJson("nemotron", "<TOOLCALL>", "</TOOLCALL>"),
    SectionedJson(
        "deepseek",
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        separator="<｜tool▁sep｜>",
    ),
    SectionedJson(
        "kimi_k2",
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        call=("<|tool_call_begin|>", "<|tool_call_end|>"),
        separator="<|tool_call_argument_begin|>",
    ),
    LlamaJson(),
)
REASONING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))

_NAME, _OTHER = "get_value_7919", "set_value_7927"
_PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "number": {"type": "integer"},
        "flag": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "string"}},
    },
}
_TOOLS: tuple[dict[str, Any], ...] = tuple(
    {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": _PARAMETERS}}
    for name in (_NAME, _OTHER)
)
# Nine letters and digits: the only ids that Mistral's templates accept.
_CALL = ToolCall(_NAME, {"text": 'a "b" {c} é\n<d>', "number": 5, "flag": True, "list": ["x", "y"]}, "abcdefgh1")
_SECOND = ToolCall(_OTHER, {"text": "5"}, "abcdefgh2")
_QUESTION = Message("user", "A question")


@dataclass(frozen=True)
class AnswerFormat:
    """How a template writes answers.

    Attributes:
        syntax: How its answers are read.
        shape: The texts around the parts of its answers.
        has_calls: Whether calls can be read.
        is_parallel: Whether an answer may have several calls.
        problem: The reason why calls cannot be read.
    """

    syntax: AnswerSyntax
    shape: AnswerShape
    has_calls: bool = False
    is_parallel: bool = False
    problem: str = ""

    @property
    def is_bare(self) -> bool:
        """Whether calls have no marker, so that JSON may be one."""
        return isinstance(self.syntax, MarkedAnswer) and self.syntax.calls is not None and self.syntax.calls.is_bare

    def begins_in_reasoning(self, prompt: str) -> bool:
        """Whether a prompt, or its end, has opened the reasoning of its answer."""
        return self.syntax.reasoning is not None and prompt.rstrip().endswith(self.syntax.reasoning[0])


def find_answer_format(chat_format: ChatFormat) -> AnswerFormat:
    """Probes a chat template."""

    def write(content: str, reasoning: str, calls: Sequence[ToolCall]) -> str | None:
        try:
            answer = Message("assistant", content, reasoning=reasoning, tool_calls=tuple(calls))
            return answer_text(chat_format, Conversation((_QUESTION, answer), _TOOLS))
        except DataError:
            return None

    plain = _find_plain(chat_format, write)
    text, both = write("", "", (_CALL,)), write("", "", (_CALL, _SECOND))
    calls = tuple(ToolCall(call.name, call.arguments) for call in (_CALL, _SECOND))
    problem = "no known parser reads the calls that the chat template writes"
    if text is None or _CALL.name not in text:
        problem = _why_no_calls(chat_format)
    else:
        candidates: list[AnswerSyntax] = [MarkedAnswer(each, plain.reasoning) for each in SYNTAXES]
        for syntax in (*candidates, Harmony()):
            if _reads(syntax, text, Answer(calls=calls[:1])):
                is_parallel = both is not None and _reads(syntax, both, Answer(calls=calls))
                shape = find_shape(write, (syntax.reasoning or ("", None))[1], (_CALL, _SECOND))
                return AnswerFormat(syntax, shape, has_calls=True, is_parallel=is_parallel)
    return AnswerFormat(plain, find_shape(write, (plain.reasoning or ("", None))[1], (_CALL, _SECOND)), problem=problem)


def answer_text(chat_format: ChatFormat, conversation: Conversation) -> str:
    """The text that training trains on in the last answer, without its end token. Raises DataError."""
    ids, mask = chat_format.encode_example(conversation).documents()[-1]
    trained = [int(token) for token, is_trained in zip(ids, mask, strict=True) if is_trained]
    while trained and trained[-1] in chat_format.stop_token_ids:
        trained.pop()
    return chat_format.decode(trained)


def _why_no_calls(chat_format: ChatFormat) -> str:
    answer = Message("assistant", "", tool_calls=(_CALL,))
    try:
        answer_text(chat_format, Conversation((_QUESTION, answer), _TOOLS))
    except DataError as err:
        return str(err)
    return "the chat template leaves tool calls out"


def _reads(syntax: AnswerSyntax, text: str, expected: Answer) -> bool:
    for in_reasoning in (False, True):
        try:
            if parse_answer(text, syntax, _TOOLS, in_reasoning=in_reasoning) == expected:
                return True
        except ValueError:
            continue
    return False


def _find_plain(chat_format: ChatFormat, write: Write) -> AnswerSyntax:
    """The syntax of answers without calls. The markers around reasoning are those that the template or its prompts have."""
    texts = [write(CONTENT, "", ()) or "", write(CONTENT, REASONING, ()) or ""]
    if texts[0].startswith("<|channel|>final<|message|>"):
        return Harmony()
    with suppress(DataError):
        texts.append(chat_format.render(Conversation((_QUESTION,)), add_generation_prompt=True))
    return MarkedAnswer(
        reasoning=next(
            (marks for marks in REASONING_MARKS if any(mark in text for mark in marks for text in texts)), None
        )
    )
