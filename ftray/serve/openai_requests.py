"""The bodies of OpenAI's requests, as far as this endpoint answers them. Tools are in `openai_tools`.

Unsupported fields are rejected by name. Knows nothing of Ray, torch, web frameworks or engines.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StringConstraints, field_validator, model_validator

from ftray.engine.protocol import MAX_LOGPROBS
from ftray.serve.openai import RequestError, StrictModel, bounded_schema, read_object, validate, whole_characters
from ftray.serve.openai_tools import AssistantCall, FunctionTool, NamedTool, check_tools

MAX_MESSAGES, MAX_NAME_CHARS = 256, 256
MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_N, MAX_PROMPTS, MAX_ANSWERS = 8, 16, 32
MAX_BIASES = 1024
MAX_CALLS = 64  # in one message

# Unsupported fields that clients send, with the values under which they have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Fields that have no effect on an answer.
_HARMLESS = frozenset({"metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "service_tier"})


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """One message. Clients send our own answers back, so all their fields are known."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[AssistantCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None

    @property
    def text(self) -> str:
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)

    @model_validator(mode="after")
    def _readable(self) -> ChatMessage:
        for text in (self.text, self.name, self.reasoning_content, self.reasoning):
            whole_characters(text or "")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.thoughts)):
            raise ValueError("content is missing; only an assistant's message with tool_calls may leave it out")
        if self.role != "assistant" and (self.tool_calls or self.thoughts):
            raise ValueError("only an assistant's message may have tool_calls or reasoning_content")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id is required in messages of the role tool, and not allowed in others")
        if self.reasoning and self.reasoning_content and self.reasoning != self.reasoning_content:
            raise ValueError("reasoning and reasoning_content differ; send one of them")
        return self

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or ""

    def turn(self) -> dict[str, Any]:
        """The message as `chat.read_messages` expects it, and as a training record has it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.thoughts:
            turn["reasoning_content"] = self.thoughts
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        return turn | {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key))}


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; clients send it, but work without it


class JsonSchema(StrictModel):
    """The schema of an answer, which is always enforced. name, description and strict have no effect."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        return bounded_schema(value)


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is required for type json_schema, and not allowed for other types")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema as JSON, or None for plain text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return '{"type": "object"}' if self.type == "json_object" else None


_TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]


class ModelRequest(StrictModel):
    model: _Name
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    user: Annotated[str, StringConstraints(max_length=1024)] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] | None = None
    logit_bias: dict[_TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _stop_bounded(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS:
            raise ValueError(f"has {len(stops)} strings; at most {MAX_STOPS} are allowed")
        if not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise ValueError(f"strings must have 1 to {MAX_STOP_CHARS} characters")
        for stop in stops:
            whole_characters(stop)
        return value

    @field_validator("logit_bias")
    @classmethod
    def _few_biases(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if len(value or ()) > MAX_BIASES:
            raise ValueError(f"has {len(value or ())} tokens; at most {MAX_BIASES} are allowed")
        return value

    @model_validator(mode="after")
    def _options_need_stream(self) -> ModelRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def who(self) -> str | None:
        """The client's name for its user."""
        return self.safety_identifier or self.user or None

    @property
    def num_logprobs(self) -> int | None:
        """Number of likeliest tokens to return with each token's log probability, or None for no log probabilities."""
        raise NotImplementedError

    @property
    def schema_text(self) -> str | None:
        """The JSON schema of the answer."""
        return None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_tokens_asked(self) -> int | None:
        """The requested limit of tokens, or None for the endpoint's default."""
        return self.max_tokens


_TemplateValue = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | bool | int | float


class ChatRequest(ModelRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, StringConstraints(max_length=32)] | None = None
    chat_template_kwargs: dict[str, _TemplateValue] | None = None

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatRequest:
        check_tools(self.tools or [], self.tool_choice)
        return self

    @property
    def schema_text(self) -> str | None:
        return None if self.response_format is None else self.response_format.schema_text

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ValueError(f"max_tokens ({old}) and max_completion_tokens ({new}) differ; give one of them")
        return self

    @property
    def num_tokens_asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(ModelRequest):
    prompt: str | list[_TokenId] | list[str] | list[list[_TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _bounded(self) -> CompletionRequest:
        prompts = self.prompts
        if not prompts or not all(prompts):
            raise ValueError("prompt is empty")
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"prompt has {len(prompts)} texts; at most {MAX_PROMPTS} are allowed")
        if len(prompts) * (self.n or 1) > MAX_ANSWERS:
            raise ValueError(f"prompt times n must not exceed {MAX_ANSWERS}; send them in several requests")
        for text in prompts:
            whole_characters(text if isinstance(text, str) else "")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: the engine gives no log probabilities of prompts")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class FeedbackRequest(StrictModel):
    """A user's opinion of an answer, the last of `messages`. id: from the answer's response, to the same API key."""

    rating: Literal["up", "down"]
    messages: Annotated[list[ChatMessage], Field(min_length=2, max_length=MAX_MESSAGES)]
    tools: list[FunctionTool] | None = None
    comment: Annotated[str, StringConstraints(max_length=4096)] | None = None
    correction: Annotated[str, StringConstraints(min_length=1, max_length=65536)] | None = None
    model: _Name | None = None
    id: _Name

    @model_validator(mode="after")
    def _answer_last(self) -> FeedbackRequest:
        for text in (self.comment, self.correction):
            whole_characters(text or "")
        check_tools(self.tools or [], None)
        last = self.messages[-1]
        if last.role != "assistant" or not (last.text or last.tool_calls):
            raise ValueError("messages must end with the assistant's answer")
        return self


R = TypeVar("R", bound=ModelRequest)


def parse_request(body: bytes, kind: type[R], *, max_tokens: int) -> R:
    """Reads a body. Raises RequestError (400) that names the field. max_tokens: the most that a request may ask for."""
    raw = read_object(body)
    for field, empty in _UNSUPPORTED.items():
        if field in raw and field not in kind.model_fields and not any(_same(raw[field], value) for value in empty):
            message = f"{field} is not supported by this endpoint; remove it"
            raise RequestError(400, message, param=field, code="unsupported")
    ignored = (_UNSUPPORTED.keys() | _HARMLESS) - kind.model_fields.keys()
    known = {key: value for key, value in raw.items() if key not in ignored}
    request = validate(known, kind)
    check_limit(request, "max_tokens" if request.max_tokens is not None else "max_completion_tokens", max_tokens)
    return request


def check_limit(request: ModelRequest, field: str, max_tokens: int) -> None:
    """Raises RequestError (400) if a request asks for more tokens than the endpoint allows."""
    num_requested = request.num_tokens_asked
    if num_requested is not None and num_requested > max_tokens:
        message = f"{field} ({str(num_requested)[:40]}) exceeds the endpoint's limit of {max_tokens}"
        raise RequestError(400, message, param=field)


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)  # for Python 1 == True and 0 == False
