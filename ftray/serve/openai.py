"""OpenAI's request bodies and errors. The bodies of answers are in `openai_responses`.

Unsupported fields are rejected by name. Knows nothing of Ray, torch, web frameworks or engines.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from ftray.engine.protocol import MAX_LOGPROBS
from ftray.storage import strict_json

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH, MAX_MESSAGES = 64, 256
MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_N, MAX_NAME_CHARS = 8, 256
MAX_SCHEMA_CHARS, MAX_SCHEMA_COUNTS = 1 << 14, 10_000
_COUNTING = {f"{end}{what}" for end in ("min", "max") for what in ("Items", "Length", "Properties", "Contains")}
_REPEATS = re.compile(r"[{,]\s*(\d{1,9})(?=\s*[,}])")


class RequestError(Exception):
    """A refusal, as HTTP status and OpenAI's error body. is_permanent: a 503 that a retry cannot change."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        is_permanent: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        waits = retry_after_s is None and status in (429, 503) and not is_permanent
        self.retry_after_s = 1.0 if waits else retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """The Retry-After header, in whole seconds."""
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# Unsupported fields that clients send, with the values under which they have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _whole_characters(text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("contains half a surrogate pair, which is not a character")
    return text


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message. The fields after content come from clients that send our own answers back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _readable(self) -> ChatMessage:
        _whole_characters(self.text)
        return self

    def turn(self) -> dict[str, str]:
        """The message as `chat.read_messages` expects it. `developer` is OpenAI's newer name for system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; clients send it, but work without it


class JsonSchema(_Strict):
    """The schema of an answer, which is always enforced. name, description and strict have no effect."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        if len(json.dumps(value)) > MAX_SCHEMA_CHARS:
            raise ValueError(f"must have at most {MAX_SCHEMA_CHARS} characters")
        if sum(_counts(value)) > MAX_SCHEMA_COUNTS:
            raise ValueError(f"the sum of its lengths, sizes and repetitions must not exceed {MAX_SCHEMA_COUNTS}")
        return value


def _counts(schema: Any) -> Iterator[int]:
    """Numbers that unroll the schema's grammar: minItems and similar, and {m,n} in patterns."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield from (int(n) for key, n in part.items() if key in _COUNTING and isinstance(n, int | float) and n > 0)
            todo += part.values()
        elif isinstance(part, list):
            todo += part
        elif isinstance(part, str):
            yield from map(int, _REPEATS.findall(part))


class ResponseFormat(_Strict):
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


_Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]


class _Request(_Strict):
    model: _Name
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    user: Annotated[str, StringConstraints(max_length=1024)] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
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
            _whole_characters(stop)
        return value

    @model_validator(mode="after")
    def _options_need_stream(self) -> _Request:
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


class ChatRequest(_Request):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

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


class CompletionRequest(_Request):
    prompt: str | list[_TokenId] | list[str]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, value: str | list[int] | list[str]) -> str | list[int] | list[str]:
        if not value:
            raise ValueError("is empty")
        if isinstance(value, list) and isinstance(value[0], str) and len(value) > 1:
            raise ValueError(f"has {len(value)} prompts; send one per request")
        for text in [value] if isinstance(value, str) else value:
            if isinstance(text, str):
                _whole_characters(text)
        return value

    @property
    def prompt_or_ids(self) -> str | list[int]:
        first = self.prompt[0]
        return first if isinstance(self.prompt, list) and isinstance(first, str) else self.prompt  # type: ignore[return-value]


class FeedbackRequest(_Strict):
    """A user's opinion of an answer, the last of `messages`. id: from the answer's response, to the same API key."""

    rating: Literal["up", "down"]
    messages: Annotated[list[ChatMessage], Field(min_length=2, max_length=MAX_MESSAGES)]
    comment: Annotated[str, StringConstraints(max_length=4096)] | None = None
    correction: Annotated[str, StringConstraints(min_length=1, max_length=65536)] | None = None
    model: _Name | None = None
    id: _Name

    @model_validator(mode="after")
    def _answer_last(self) -> FeedbackRequest:
        for text in (self.comment, self.correction):
            _whole_characters(text or "")
        if self.messages[-1].role != "assistant" or not self.messages[-1].text:
            raise ValueError("messages must end with the assistant's answer")
        return self


R = TypeVar("R", bound=_Request)
M = TypeVar("M", bound=BaseModel)


def read_object(body: bytes) -> dict[str, Any]:
    """A body as a JSON object. Raises RequestError (400)."""
    try:
        raw = strict_json.parse(body, max_bytes=MAX_BODY_BYTES, max_depth=MAX_DEPTH)
    except ValueError as err:
        raise RequestError(400, f"the body is not valid JSON: {str(err)[:200]}") from None
    if not isinstance(raw, dict):
        raise RequestError(400, "the body must be a JSON object")
    return raw


def validate(raw: dict[str, Any], kind: type[M]) -> M:
    """Raises RequestError (400) that names the field."""
    try:
        return kind.model_validate(raw)
    except ValidationError as err:
        raise _explain(err) from None


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
    num_requested = request.num_tokens_asked
    if num_requested is not None and num_requested > max_tokens:
        field = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
        raise RequestError(
            400, f"{field} ({str(num_requested)[:40]}) exceeds the endpoint's limit of {max_tokens}", param=field
        )
    return request


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)  # for Python 1 == True and 0 == False


def _explain(err: ValidationError) -> RequestError:
    """The deepest error: a union reports one per member, and the deepest is from the intended member."""
    first = max(err.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    unknown = first["type"] == "extra_forbidden"
    # unions put the names of their members into the path; clients do not know them
    path = [p for p in first["loc"] if isinstance(p, int) or p in _FIELDS or (unknown and p is first["loc"][-1])]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    text = first["msg"].removeprefix("Value error, ")
    if unknown:
        message = f"{param} is unknown to this endpoint; remove it"
        return RequestError(400, message, param=param, code="unknown_field")
    text = text if param is None or text.startswith(param) else f"{param}: {text[:1].lower()}{text[1:]}"
    return RequestError(400, text, param=param)


_BODIES = (
    ChatRequest,
    CompletionRequest,
    ChatMessage,
    TextPart,
    StreamOptions,
    FeedbackRequest,
    ResponseFormat,
    JsonSchema,
)
_FIELDS = frozenset(field for body in _BODIES for field in body.model_fields) | {"schema"}


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair stays the escape that it came as."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
