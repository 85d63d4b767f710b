"""Fixtures of the tests that run commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.command import Place
from tests.fork_server import ForkServer, fork_server


@pytest.fixture(scope="session")
def worker_server() -> Iterator[ForkServer]:
    """The process that Ray workers of this session are forked from."""
    with fork_server() as server:
        yield server


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A directory for a module's commands. What they leave running is killed at the end.

    Workers are forked, unless the module sets FORKED_WORKERS to False because it needs Ray's own process tree.
    """
    is_forked = getattr(request.module, "FORKED_WORKERS", True)
    place = Place(tmp_path_factory.mktemp("place"), request.getfixturevalue("worker_server") if is_forked else None)
    try:
        yield place
    finally:
        place.close()
