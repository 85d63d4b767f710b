"""Fixtures for tests that start Ray in their own process."""

from collections.abc import Iterator

import pytest

from tests.fork_server import fork_server


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """Ray clusters of this session start their workers as forks."""
    with fork_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield
