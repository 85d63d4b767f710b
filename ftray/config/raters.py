"""The sections of what others think of the answers: people (evaluate.human), another model (evaluate.judge)."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ftray.config.base import Int, Positive, Section

_CRITERIA = ["accuracy", "relevance", "quality", "style", "safety"]
_Criterion = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9 _-]{0,29}$")]


class HumanEvalConfig(Section):
    """The blinded sheet of `ftray evaluate human`."""

    samples: Positive = 100
    """Questions on the sheet, of each slice its share; all that both models have answered (`num_generations`) where these
    are fewer."""
    criteria: list[_Criterion] = Field(_CRITERIA, max_length=12)
    """What each answer is scored by, from 1 to 5; of an empty list only the preferred answer is asked."""
    seed: Annotated[Int, Field(ge=0)] = 0
    """Another seed gives another choice, order and sides; the same always the same sheet."""

    @field_validator("criteria")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("names a criterion twice; remove one")
        return value


class JudgeConfig(Section):
    """Another model that says which answer is better, through an OpenAI-compatible endpoint."""

    url: str
    """The endpoint's base, up to /v1: `https://api.example.com/v1`, or `http://127.0.0.1:8000/v1`."""
    model: str = Field(min_length=1)
    """The model's name there."""
    key_env: str | None = None
    """Environment variable that holds the endpoint's key; left out: none is sent. The key itself belongs in no file."""
    samples: Positive = 100
    """Questions that are judged, each in both orders; all that there are where these are fewer."""

    @model_validator(mode="after")
    def _no_secret_is_here(self) -> JudgeConfig:  # of the whole section, whose values a message doesn't repeat
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be an address such as https://api.example.com/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "url must hold no user, key or query, which would end up in files; name the key by key_env"
            )
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ValueError("key_env must be the name of an environment variable (letters, digits, _), not the key")
        return self
