"""Fixtures and checks for every test."""

import os
from collections.abc import Iterator

import pytest

pytest_plugins = ["tests.fixtures_s3"]

# Must be set before torch is imported, here and in child processes: with more processes than cores, OpenMP threads
# spin and wait for each other, and one second of work takes minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Settings that change how later tests of the same process behave.
WATCHED = ("AWS_", "FTRAY_", "HF_", "RAY_AUTH_")


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """A test that leaves a setting behind in the environment fails itself, not a later test."""
    before = _watched()
    yield
    after = _watched()
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    assert after == before, (
        "the test left environment variables behind; use monkeypatch.setenv before the code sets them"
    )


def _watched() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(WATCHED)}
