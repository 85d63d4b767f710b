"""A sample of the hostile corpus keeps its promises; `python -m bench.hostile` runs all of it."""

from __future__ import annotations

import pytest

from bench.hostile.__main__ import sample
from bench.hostile.case import Case, all_cases
from bench.hostile.data import Payload
from bench.hostile.run import run_case

CASES = all_cases()


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 150
    assert {"data", "models", "run files"} <= {case.kind for case in CASES}


@pytest.mark.parametrize("case", sample(CASES, 8), ids=lambda case: case.full_name)
def test_a_hostile_case_is_answered_in_one_sentence_and_does_no_harm(case: Case) -> None:
    outcome = run_case(case)
    assert not outcome.faults, outcome.output


def run_payload() -> None:
    """What the runner must notice."""
    import os
    from pathlib import Path

    Path("../outside/other").write_text("x")
    Payload(Path("../outside/canary").resolve()).__reduce__()[0](Path("../outside/canary"))
    print("Traceback (most recent call last)", flush=True)
    os._exit(1)


def run_forever() -> None:
    """A hang."""
    while True:
        pass


def take_memory() -> None:
    """Half a gigabyte."""
    import time

    kept = b"x" * (1 << 29)
    time.sleep(60)
    assert kept


def test_the_runner_notices_what_it_looks_for() -> None:
    faults = run_case(Case("payload", lambda place: None, run_payload)).faults
    assert any("ran code" in fault for fault in faults)
    assert any("wrote outside" in fault and "other" in fault for fault in faults)
    assert any("traceback" in fault for fault in faults)
    assert any("exit code is 1" in fault for fault in faults)
    assert run_case(Case("hang", lambda place: None, run_forever), deadline_s=1).faults == ["it ran for more than 1 s"]
    assert "MiB" in run_case(Case("memory", lambda place: None, take_memory), memory_bytes=500 << 20).faults[0]
