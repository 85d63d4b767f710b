"""The body of /v1/responses, and its translation to a chat request. Nothing is stored, so every request has its whole history."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from ftray.serve.openai import RequestError, StrictModel, validate
from ftray.serve.openai_requests import MAX_NAME_CHARS, ChatRequest, JsonSchema, check_limit

MAX_ITEMS = 512
# Fields that clients send, with the values under which they have no effect here.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "context_management": (None, []),
    "conversation": (None,),
    "include": (None, []),
    "max_tool_calls": (None,),
    "moderation": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "store": (None, False),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}
_HARMLESS = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "service_tier", "stream_options"}
)

_Text = Annotated[str, StringConstraints(max_length=1 << 20)]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]


class ContentPart(StrictModel):
    """A part of a message. The last fields come from clients that send our own answers back."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: _Text
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class MessageItem(StrictModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[ContentPart]
    id: _Name | None = None
    status: str | None = None
    phase: None = None


class CallItem(StrictModel):
    type: Literal["function_call"]
    call_id: _Name
    name: _Name
    arguments: _Text
    id: _Name | None = None
    status: str | None = None


class ResultItem(StrictModel):
    type: Literal["function_call_output"]
    call_id: _Name
    output: _Text | list[ContentPart]
    id: _Name | None = None
    status: str | None = None


class ReasoningItem(StrictModel):
    type: Literal["reasoning"]
    id: _Name | None = None
    summary: list[ContentPart] | None = None
    content: list[ContentPart] | None = None
    encrypted_content: None = None
    status: str | None = None


_KINDS = {"function_call": "a call", "function_call_output": "a result", "reasoning": "reasoning item"}


def _kind_of_item(raw: Any) -> str:
    kind = raw.get("type") if isinstance(raw, dict) else None
    return _KINDS.get(kind, "a message") if isinstance(kind, str) else "a message"


class ResponseTool(StrictModel):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(StrictModel):
    type: Literal["function"]
    name: str


class TextFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(StrictModel):
    format: TextFormat | None = None
    verbosity: None = None


class ReasoningConfig(StrictModel):
    effort: Annotated[str, StringConstraints(max_length=32)] | None = None
    summary: None = None
    generate_summary: None = None


_Item = Annotated[
    Annotated[MessageItem, Tag("a message")]
    | Annotated[CallItem, Tag("a call")]
    | Annotated[ResultItem, Tag("a result")]
    | Annotated[ReasoningItem, Tag("reasoning item")],
    Discriminator(_kind_of_item),
]


class ResponsesRequest(StrictModel):
    model: _Name
    input: _Text | Annotated[list[_Item], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: _Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _whole_format(self) -> ResponsesRequest:
        chosen = self.text.format if self.text else None
        if chosen is not None and (chosen.type == "json_schema") != (chosen.schema_ is not None):
            raise ValueError("text needs a format.schema with type json_schema, and only then")
        return self


def read_responses_request(raw: dict[str, Any], *, max_tokens: int) -> tuple[ResponsesRequest, ChatRequest]:
    """The request, and the chat request that answers it. Raises RequestError (400) that names the field."""
    for field, empty in _UNSUPPORTED.items():
        if field in raw and raw[field] not in empty:
            message = f"{field} is not supported by this endpoint, which stores no responses; remove it"
            raise RequestError(400, message, param=field, code="unsupported")
    ignored = _UNSUPPORTED.keys() | _HARMLESS
    request = validate({key: value for key, value in raw.items() if key not in ignored}, ResponsesRequest)
    try:
        body = validate(_chat_fields(request, raw), ChatRequest)
    except RequestError as err:
        param = (
            err.param.replace("messages", "input", 1) if err.param and err.param.startswith("messages") else err.param
        )
        raise RequestError(400, err.message, param=param, code=err.code) from None
    check_limit(body, "max_output_tokens", max_tokens)
    return request, body


def _chat_fields(request: ResponsesRequest, raw: dict[str, Any]) -> dict[str, Any]:
    """The body of the same request to /v1/chat/completions."""
    same = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "user", "safety_identifier")
    fields = {name: getattr(request, name) for name in same}
    fields |= {"max_completion_tokens": request.max_output_tokens, "messages": _messages(request)}
    if request.tools:
        fields["tools"] = [_tool(tool) for tool in raw["tools"]]
    choice = request.tool_choice
    if isinstance(choice, NamedResponseTool):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = choice
    if request.reasoning is not None and request.reasoning.effort is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    chosen = request.text.format if request.text else None
    if chosen is not None:
        fields["response_format"] = {"type": chosen.type}
        if chosen.schema_ is not None:
            schema = {"name": chosen.name or "answer", "schema": chosen.schema_, "strict": chosen.strict}
            fields["response_format"]["json_schema"] = JsonSchema.model_validate(schema).model_dump(by_alias=True)
    return fields


def _tool(raw: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {key: value for key, value in raw.items() if key != "type"}}


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation. Items of one answer that follow each other become one message."""
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        if isinstance(item, ResultItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": _text(item.content)})
        else:
            _add_to_answer(messages, item)
    return messages


def _add_to_answer(messages: list[dict[str, Any]], item: MessageItem | CallItem | ReasoningItem) -> None:
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    is_new = last is None or (isinstance(item, ReasoningItem) and (last["content"] or last.get("tool_calls")))
    if last is None or is_new or (isinstance(item, MessageItem) and last["content"]):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        last.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, ReasoningItem):
        if text := _text(item.content or item.summary or []):
            last["reasoning_content"] = last.get("reasoning_content", "") + text
    else:
        last["content"] = _text(item.content)


def _text(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
