"""Tools in OpenAI's requests: definitions, the choice among them, and calls in earlier messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, StringConstraints, field_validator, model_validator

from ftray.serve.openai import StrictModel, bounded_schema, whole_characters

MAX_TOOLS = 128
MAX_DESCRIPTION_CHARS = 1 << 14
MAX_CALL_ID_CHARS = 256
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(StrictModel):
    """A function that the model may call. strict: its calls follow the schema exactly."""

    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _an_objects_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return value
        if value.get("type", "object") != "object":
            raise ValueError("must be a JSON schema of type object")
        return bounded_schema(value)

    @field_validator("description")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        return value and whole_characters(value)


class FunctionTool(StrictModel):
    """A tool. raw: as the client sent it, because the order of its keys shows in the prompt."""

    type: Literal["function"]
    function: FunctionDefinition
    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ModelWrapValidatorHandler[FunctionTool]) -> FunctionTool:
        tool = handler(value)
        if isinstance(value, dict):
            tool._raw.update(value)
        return tool

    @property
    def raw(self) -> dict[str, Any]:
        return self._raw


class NamedFunction(StrictModel):
    name: FunctionName


class NamedTool(StrictModel):
    """Forces a call of one function."""

    type: Literal["function"]
    function: NamedFunction


class FunctionCall(StrictModel):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, value: str) -> str:
        whole_characters(value)
        try:
            arguments = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            raise ValueError("must be the JSON of an object, as a string") from None
        if not isinstance(arguments, dict):
            raise ValueError("must be the JSON of an object, as a string")
        return value


class AssistantCall(StrictModel):
    """A call in an earlier message. index: some clients keep it from a stream."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_CALL_ID_CHARS)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Annotated[int, Field(ge=0)] | None = None


def check_tools(tools: Sequence[FunctionTool], choice: str | NamedTool | None) -> None:
    """Raises ValueError if there are too many tools, two with one name, or the choice is not among them."""
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"tools has {len(tools)} functions; at most {MAX_TOOLS} are allowed")
    names = [tool.function.name for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"tools has several functions of the name {min(twice)}; names must differ")
    if choice == "required" and not tools:
        raise ValueError("tool_choice is required, but there are no tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ValueError(f"tool_choice names the function {choice.function.name}, which is not in tools")
