"""The pages that ftray writes, in a real browser: nothing is asked for, nothing complains, nobody is shut out.

A report of a run with two kills, a sweep and a page of data, at a phone's width and a desk's, light and dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftray.data.stats import DatasetStats, SplitStats
from ftray.report.data_page import render_page as render_data
from ftray.report.run_report import write_report
from ftray.report.sweep_page import render_page as render_sweep
from ftray.tune.state import EvalReport, SweepState, TrialRecord
from tests.browser import chromium
from tests.runs import with_two_kills

WIDTHS = {"phone": 390, "desk": 1280}
GRAVE = ("serious", "critical")
CUT = """[...document.querySelectorAll('svg text')].filter(text => {
  const own = text.getBoundingClientRect(), plot = text.closest('svg').getBoundingClientRect();
  return own.left < plot.left - 0.5 || own.right > plot.right + 0.5 || own.top < plot.top - 0.5 || own.bottom > plot.bottom + 0.5;
}).map(text => text.textContent)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    run, run_dir = with_two_kills(place)
    found = {"report": Path(write_report(run, str(run_dir)))}
    for name, text in (("sweep", sweep()), ("data", data())):
        found[name] = place / f"{name}.html"
        found[name].write_text(text)
    return found


def sweep() -> str:
    trials = [
        TrialRecord(
            n,
            {"train.learning_rate": 10.0 ** (-2 - n), "method.rank": 4 * (n + 1), "train.schedule": "cosine"},
            "done",
            10,
            [EvalReport(n, s, s / 10, 3.0 - n * 0.2 - s * 0.1, False) for s in (2, 6, 10)],
        )
        for n in range(5)
    ]
    state = SweepState({}, trials)
    winner = state.winner()
    assert winner is not None
    importance = (0.5, {"train.learning_rate": 0.8, "method.rank": 0.2})
    return render_sweep("a-sweep", state, winner, importance, "ftray train jobs/sweep.yaml name=a-sweep-best")


def data() -> str:
    lengths = np.sort(np.random.default_rng(0).integers(10, 900, 1000).astype(np.int32))
    labels = {f"label {n} with quite a long name": 10 * (n + 1) for n in range(6)}
    part = SplitStats(
        "train",
        1000,
        40_000,
        20_000,
        90,
        0.97,
        lengths,
        labels,
        {"LATIN": 0.9, "GREEK": 0.1},
        {"have several lines": 0.3},
        {},
        {},
        {},
    )
    return render_data(DatasetStats(part, None, ["nothing is held out"]), "some data")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "sweep", "data"])
def test_a_page_asks_for_nothing_fits_and_shuts_nobody_out(
    browser: Any, pages: dict[str, Path], name: str, width: str, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    asked: list[str] = []
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": WIDTHS[width], "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(pages[name].as_uri())
    assert asked == [pages[name].as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width], "wider than the screen"
    small = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
    )
    assert small >= 9, f"a plot's text is {small} pixels high"
    assert page.evaluate(CUT) == [], "a plot's text is cut at its edge"
    found = Axe().run(page).response["violations"]
    told = [(v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in GRAVE]
    assert told == []
    context.close()


def test_charts_show_values_on_hover_and_can_be_smoothed(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1000, "height": 1200})
    page.goto(pages["report"].as_uri())
    assert page.locator(".chart canvas").count() == page.locator(".chart").count() == 5
    page.locator(".u-over").first.hover(position={"x": 100, "y": 50})
    legend = page.locator(".u-legend").first.locator(".u-value").all_inner_texts()
    assert int(legend[0]) > 0, "the step"
    assert float(legend[1]) > 0, "the training loss"
    page.locator(".smoothing input").fill("0.9")
    assert page.locator(".smoothing output").inner_text() == "0.90"
    smoothed = page.locator(".u-legend").first.locator(".u-value").all_inner_texts()
    assert smoothed[0] == legend[0]
    assert float(smoothed[1]) > float(legend[1]), "the mean of a falling loss lies above it"
    page.goto(pages["sweep"].as_uri())
    page.locator(".u-over").first.hover(position={"x": 100, "y": 60})
    assert page.locator(".chart output").first.inner_text().startswith("trial-")
    page.close()


def test_on_paper_no_plot_is_cut(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["report"].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    assert page.evaluate("getComputedStyle(document.querySelector('div.grid section')).breakInside") == "avoid"
    assert page.pdf(format="A4")[:4] == b"%PDF"
