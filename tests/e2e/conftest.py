"""Fixtures of the tests that type commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.command import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A directory for a module's commands; what they leave running is ended with it."""
    made = Place(tmp_path_factory.mktemp("place"))
    try:
        yield made
    finally:
        made.close()
