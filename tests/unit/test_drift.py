"""Requests against what was trained on: figures that are told, and when."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ftray.serve.adapter_cache import ServedModels
from ftray.serve.drift import LAST, LEAST, DriftMonitor, RequestSample, scripts_of
from ftray.serve.routes import build_api
from tests.unit.test_serve_protocol import PaperEngine, call

REFERENCE = {"prompt_tokens": [10, 20, 30, 40, 50, 60, 70, 80, 90], "scripts": {"LATIN": 0.9, "GREEK": 0.1}}


def figures_of(lengths: list[int], text: str = "a" * 9 + "α", empty: bool = False, reference: Any = REFERENCE) -> Any:
    drift = DriftMonitor()
    for length in lengths:
        drift.add("m", RequestSample(length, scripts_of(text), empty))
    return drift.figures("m", reference)


def test_requests_like_the_training_data_have_no_drift() -> None:
    found = figures_of(list(range(1, 101)) * 3)
    assert found.prompt_tokens == pytest.approx(0, abs=1e-3)
    assert found.scripts == pytest.approx(0)
    assert found.empty == 0


def test_longer_prompts_other_scripts_and_empty_answers_show() -> None:
    assert figures_of([n + 30 for n in range(1, 101)] * 3).prompt_tokens > 0.25
    assert figures_of([5000] * 200).prompt_tokens > 2
    assert figures_of(list(range(1, 101)), "мир мир").scripts == 1
    assert figures_of(list(range(1, 101)), "abcd αβγδ").scripts == pytest.approx(0.4)
    assert figures_of([1] * 100, empty=True).empty == 1


def test_equal_deciles_share_a_bin() -> None:
    same = {"prompt_tokens": [7] * 9, "scripts": {}}
    assert figures_of([7] * 90 + [8] * 10, reference=same).prompt_tokens == pytest.approx(0, abs=1e-3)
    assert figures_of([9] * 100, reference=same).prompt_tokens > 1


def test_what_is_unknown_is_not_told() -> None:
    found = figures_of([1] * 100, text="123", reference=None)
    assert (found.prompt_tokens, found.scripts, found.empty) == (None, None, 0)
    assert figures_of([1] * 100, text="123").scripts is None  # no letters


def test_only_the_last_requests_count_and_a_few_say_nothing() -> None:
    drift = DriftMonitor()
    for _ in range(LEAST - 1):
        drift.add("m", RequestSample(1, {}, True))
    assert drift.models() == []
    for _ in range(LAST):
        drift.add("m", RequestSample(1, {}, False))
    assert drift.models() == ["m"]
    assert drift.figures("m", None).empty == 0


def test_metrics_tell_the_drift_of_chats_and_completions(tmp_path: Path) -> None:
    app = build_api(PaperEngine(words=("",)), ServedModels("m", references={"m": REFERENCE}), max_tokens=50)
    chat = {"model": "m", "messages": [{"role": "user", "content": "мир"}], "max_tokens": 2}
    plain = {"model": "m", "prompt": "привет", "max_tokens": 2}

    async def work() -> str:
        for _ in range(LEAST // 2):
            assert (await call(app, "/v1/chat/completions", chat)).status == 200
        before = b"".join((await call(app, "/metrics", None)).pieces).decode()
        assert "ftray_drift_scripts{" not in before
        for _ in range(LEAST // 2):
            assert (await call(app, "/v1/completions", plain)).status == 200
        return b"".join((await call(app, "/metrics", None)).pieces).decode()

    told = dict(line.rsplit(" ", 1) for line in asyncio.run(work()).splitlines() if line.startswith("ftray_drift"))
    assert float(told['ftray_drift_scripts{model="m"}']) == 1
    assert float(told['ftray_drift_empty{model="m"}']) == 1
    assert float(told['ftray_drift_prompt_tokens{model="m"}']) > 0.25


def test_a_published_adapter_brings_its_reference(tmp_path: Path) -> None:
    from ftray.serve.adapter_cache import AdapterCache
    from tests.unit.test_adapter_cache import META, put, served

    put(tmp_path, "polite", meta={**META, "reference": REFERENCE})

    async def work() -> Any:
        catalog = AdapterCache(PaperEngine(), served(tmp_path))  # type: ignore[arg-type]
        await catalog.start()
        await catalog.stop()
        return catalog.reference("small:polite"), catalog.reference("small")

    assert asyncio.run(work()) == (json.loads(json.dumps(REFERENCE)), None)
