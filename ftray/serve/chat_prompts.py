"""From a chat request to the prompt's ids, and to the parser that reads its answer. Knows templates through `chat` only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.chat import ChatFormat, Conversation, read_messages, read_tools
from ftray.chat.parsers.answer import AnswerParser
from ftray.chat.parsers.grammars import MAX_GRAMMAR_CHARS, GrammarWriter
from ftray.chat.parsers.probe import AnswerFormat, find_answer_format
from ftray.chat.special_tokens import special_tokens
from ftray.errors import DataError
from ftray.serve.openai import RequestError
from ftray.serve.openai_requests import ChatRequest
from ftray.serve.openai_tools import NamedTool

_END = 32  # tokens of a prompt in which the beginning of the answer's reasoning is looked for


@dataclass(frozen=True)
class ChatPrompt:
    """A chat request, ready for an engine.

    Attributes:
        ids: The prompt.
        text: All texts of the messages.
        new_parser: Makes the parser of one answer.
        visible_ids: Special tokens that the parser must see.
        max_calls: Calls after which an answer ends; None: no limit.
        json_schema: The schema of the whole answer.
        grammar: The grammar of the whole answer.
        is_named: Whether the request names the function that is called.
        constraint: The field of the request that the schema or grammar is from.
    """

    ids: list[int]
    text: str
    new_parser: Callable[[], AnswerParser]
    visible_ids: frozenset[int] = frozenset()
    max_calls: int | None = None
    json_schema: str | None = None
    grammar: str | None = None
    is_named: bool = False
    constraint: str = "response_format"


class ChatEncoder:
    """Encodes chats for one model. tokenizer: with a chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._format = ChatFormat(tokenizer)
        self._answers: AnswerFormat = find_answer_format(self._format)
        self._added_tokens = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items()}
        self._specials = special_tokens(tokenizer)
        self._visible = {reads_calls: self._visible_ids(reads_calls) for reads_calls in (False, True)}

    def _visible_ids(self, reads_calls: bool) -> frozenset[int]:
        markers = self._answers.syntax.markers(reads_calls=reads_calls)
        return frozenset(i for token, i in self._specials.items() if any(token in marker for marker in markers))

    def encode(self, body: ChatRequest) -> ChatPrompt:
        """Encodes a request. Raises RequestError (400)."""
        tools = self._tools(body)
        try:
            messages = read_messages([message.turn() for message in body.messages])
            conversation = Conversation(messages, read_tools(tools))
            ids = self._format.encode_prompt(conversation, is_request=True, variables=self._variables(body))
        except DataError as err:
            raise RequestError(400, str(err), param="messages") from None
        end = self._format.decode(ids[-_END:])
        in_reasoning = self._answers.begins_in_reasoning(end)

        def new_parser() -> AnswerParser:
            return AnswerParser(
                self._answers.syntax, conversation.tools, reads_calls=bool(tools), in_reasoning=in_reasoning
            )

        is_single = body.parallel_tool_calls is False or not self._answers.is_parallel
        schema, grammar, constraint = self._constraint(body, conversation.tools, end, is_single=is_single)
        return ChatPrompt(
            ids=ids,
            text="\n".join(message.content for message in messages),
            new_parser=new_parser,
            visible_ids=self._visible[bool(tools)],
            max_calls=1 if is_single else None,
            json_schema=schema,
            grammar=grammar,
            is_named=isinstance(body.tool_choice, NamedTool),
            constraint=constraint,
        )

    def _constraint(
        self, body: ChatRequest, tools: Sequence[dict[str, Any]], prompt: str, *, is_single: bool
    ) -> tuple[str | None, str | None, str]:
        """The JSON schema or the grammar of the answer, and the field that asks for it."""
        schema, shape, choice = body.schema_text, self._answers.shape, body.tool_choice
        writer = GrammarWriter(shape, self._added_tokens)
        is_named = isinstance(choice, NamedTool)
        is_forced = bool(tools) and (is_named or choice == "required")
        is_strict = bool(tools) and any(tool.function.strict for tool in body.tools or ())
        constraint = "tool_choice" if is_forced else "tools" if is_strict else "response_format"
        needs_shape = bool(tools) and (is_forced or is_strict or schema is not None)
        if needs_shape and (shape.calls is None or (schema is not None and self._answers.is_bare)):
            message = f"this model's calls cannot be constrained, as {constraint} requires beside tools; leave it out"
            raise RequestError(400, message, param=constraint)
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if is_forced:
            grammar = writer.calls_answer(tools, prompt, is_single=is_single or is_named)
        elif tools and schema is not None:
            grammar = writer.calls_answer(tools, prompt, is_single=is_single, schema=schema)
        elif is_strict:
            grammar = writer.text_or_calls_answer(tools, prompt, is_single=is_single)
        elif schema is None or shape.is_bare_text:
            return schema, None, constraint
        else:
            grammar = writer.schema_answer(schema, prompt)
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                400, f"the schemas of all tools have more than {MAX_GRAMMAR_CHARS} characters", param="tools"
            )
        return None, grammar, constraint

    def _variables(self, body: ChatRequest) -> dict[str, str | int | float | bool]:
        """Values for the template. Raises RequestError (400) for names that it does not use."""
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None and not (
            "reasoning_effort" in variables or body.reasoning_effort == "none"
        ):
            if "reasoning_effort" not in self._format.variables:
                message = "reasoning_effort is not used by this model's chat template; remove it"
                raise RequestError(400, message, param="reasoning_effort", code="unsupported")
            variables["reasoning_effort"] = body.reasoning_effort
        if unknown := sorted(variables.keys() - self._format.variables):
            names = ", ".join(sorted(self._format.variables)) or "none"
            message = f"the chat template does not use {unknown[0][:80]} (it uses: {names}); remove it"
            raise RequestError(400, message, param="chat_template_kwargs")
        return variables

    def _tools(self, body: ChatRequest) -> list[dict[str, Any]]:
        """The tools that the model sees: none with `tool_choice: none`, so that it cannot call any."""
        if not body.tools or body.tool_choice == "none":
            return []
        if not self._answers.has_calls:
            raise RequestError(400, f"this model cannot call tools: {self._answers.problem}", param="tools")
        return [tool.raw for tool in body.tools]
