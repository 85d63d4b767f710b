"""The section `model`: the base model."""

from __future__ import annotations

from pydantic import Field

from ftray.config.base import Section


class ModelConfig(Section):
    """The base model."""

    base: str = Field(min_length=1)
    """Hub id (`org/name`), a local directory, or `embedded:smollm2-135m-instruct`, the small model of the quickstart."""
    revision: str | None = None
    """Commit, tag or branch on the hub; pin a commit for runs that must be reproduced."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
