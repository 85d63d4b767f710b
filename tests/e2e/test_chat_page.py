"""The page at `/` in a real browser: two models side by side, streaming, with latency; what they say is only text."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from ftray import config, storage
from ftray.engine.protocol import OutputChunk
from ftray.serve.auth import hash_key
from ftray.serve.routes import build_api
from tests.browser import chromium
from tests.unit.test_adapter_cache import HoldingEngine, put, served

EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=1</script> **bold**'
DEADLINE_MS = 60_000


class Slow(HoldingEngine):
    """A word each 20 ms, so that a page has something to stream."""

    pause_s = 0.02

    async def _say(self, reply: str) -> AsyncGenerator[OutputChunk, None]:
        words = [*f"{reply} says {EVIL}".split(" "), ""]
        for i, word in enumerate(words):
            await asyncio.sleep(self.pause_s)
            yield OutputChunk(f"{word} " if word else "", [i], None if word else "stop", 9, i + 1)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The app on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


def wait_for(page: Any, selector: str, count: int) -> None:
    """Waits until so many fit; the page's policy forbids Playwright's own way to wait for an expression."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=DEADLINE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_two_models_answer_side_by_side_and_an_opinion_is_kept(browser: Any, tmp_path: Path) -> None:
    put(tmp_path, "polite")
    engine = Slow()
    app = build_api(engine, served(tmp_path), max_tokens=500, place=str(tmp_path), feedback=config.FeedbackConfig())
    urls: list[str] = []
    complaints: list[str] = []
    with serving(app) as url:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(DEADLINE_MS)
        page.on("request", lambda request: urls.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        wait_for(page, ".side select option", 4)
        assert [select.input_value() for select in page.locator(".side select").all()] == ["small", "small:polite"]
        page.fill("#question", "Who are you?")
        page.press("#question", "Enter")
        wait_for(page, ".figures button", 4)
        sides = page.locator(".side").all()
        for side, name in zip(sides, ("base", "polite"), strict=True):
            assert side.locator(".turn.user").inner_text() == "Who are you?"
            assert side.locator(".turn.assistant").text_content() == f"{name} says {EVIL} "
            assert side.locator(".figures").text_content().startswith("first text ")
            assert "7 tokens" in side.locator(".figures").text_content()
        sides[1].locator(".figures button").first.click()
        wait_for(page, ".figures:has-text('kept as good')", 1)
        engine.pause_s = 600.0  # only the stop ends it
        page.fill("#question", "And then?")
        page.click("#send")
        wait_for(page, ".turn.assistant", 4)
        page.click("#stop")
        wait_for(page, "#send:not(:disabled)", 1)
        page.goto(f"{url}/docs")
        wait_for(page, "h2:has-text('POST /v1/chat/completions')", 1)
        assert page.evaluate("window.hit") is None
        assert complaints == []
        assert urls
        assert all(one.startswith((url, "data:")) for one in urls)
        page.close()
    (record,) = storage.list_files(str(tmp_path / "feedback/up"))
    rated = json.loads(storage.read_bytes(record.uri))
    assert rated["messages"] == [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": f"polite says {EVIL} "},
    ]
    assert rated["metadata"]["feedback"]["model"] == "small:polite"


def test_without_feedback_the_page_asks_for_no_opinion(browser: Any, tmp_path: Path) -> None:
    with serving(build_api(Slow(), served(tmp_path), max_tokens=500)) as url:
        page = browser.new_page()
        page.set_default_timeout(DEADLINE_MS)
        page.goto(url)
        wait_for(page, ".side select option", 2)
        page.fill("#question", "Who are you?")
        page.press("#question", "Enter")
        wait_for(page, ".figures:has-text('7 tokens')", 2)
        assert page.locator(".figures button").count() == 0
        page.close()


def test_with_a_key_the_page_asks_for_it(browser: Any, tmp_path: Path) -> None:
    app = build_api(Slow(), served(tmp_path), max_tokens=500, key_hashes=(hash_key("k"),))
    with serving(app) as url:
        page = browser.new_page()
        page.set_default_timeout(DEADLINE_MS)
        page.goto(url)
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", "k")
        page.press("#key", "Enter")
        wait_for(page, ".side select option", 2)
        assert page.locator("#problem").is_hidden()
        page.close()
