"""OpenAI's errors, and how a request's body becomes a model of pydantic. The models are in `openai_requests`.

Knows nothing of Ray, torch, web frameworks or engines.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ftray.storage import strict_json

MAX_BODY_BYTES, MAX_DEPTH = 1 << 20, 64
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


class StrictModel(BaseModel):
    """A part of a body. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    known_fields: ClassVar[set[str]] = {"schema"}  # of all parts, as clients know them

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        StrictModel.known_fields |= cls.model_fields.keys()


def whole_characters(text: str) -> str:
    """The text. Raises ValueError for half a surrogate pair."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("contains half a surrogate pair, which is not a character")
    return text


def bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema. Raises ValueError if it is too large to be compiled."""
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        raise ValueError(f"must have at most {MAX_SCHEMA_CHARS} characters")
    if sum(_counts(schema)) > MAX_SCHEMA_COUNTS:
        raise ValueError(f"the sum of its lengths, sizes and repetitions must not exceed {MAX_SCHEMA_COUNTS}")
    return schema


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


def _explain(err: ValidationError) -> RequestError:
    """The deepest error: a union reports one per member, and the deepest is from the intended member."""
    first = max(err.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    unknown = first["type"] == "extra_forbidden"
    # unions put the names of their members into the path; clients do not know them
    path = [
        p
        for p in first["loc"]
        if isinstance(p, int) or p in StrictModel.known_fields or (unknown and p is first["loc"][-1])
    ]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and (field := text.split()[0]) in StrictModel.known_fields and field not in path:
        param = field if param is None else f"{param}.{field}"  # of a check of several fields, which names one first
    if unknown:
        message = f"{param} is unknown to this endpoint; remove it"
        return RequestError(400, message, param=param, code="unknown_field")
    text = text if param is None or text.startswith(param) else f"{param}: {text[:1].lower()}{text[1:]}"
    return RequestError(400, text, param=param)


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair stays the escape that it came as."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
