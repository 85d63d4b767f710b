"""What sections of the run file are made of: numbers that are no booleans, groups of keys that refuse the unknown."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):  # to pydantic, true is 1
        raise PydanticCustomError("number_type", "not a number")
    return value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of keys that refuses the ones it doesn't know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
