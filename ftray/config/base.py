"""Building blocks of the run file's sections: strict numbers, and groups of keys that refuse unknown keys."""

from __future__ import annotations

from typing import Annotated, Any

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
    """A frozen group of keys that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


def defaults() -> Any:
    """The default of a field that holds a section: all of the section's own defaults.

    An instance as the default would build a validator for each section alone and double the import time of the config.
    """
    return Field({}, validate_default=True)
