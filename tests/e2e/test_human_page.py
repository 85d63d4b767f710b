"""Two raters at the page of `ftray evaluate human`, in a real browser: what they click is what the results say.

Ann types, at a desk; Bob taps, on a phone, and scores only one criterion. Ann reloads in the middle; Bob goes on in
another browser.
"""

from __future__ import annotations

import json
import random
import signal
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import pytest

from tests.browser import chromium
from tests.e2e.command import Command, Ended, Place

NUM_SAMPLES = 20
CRITERIA = ("accuracy", "style")
DEADLINE_MS = 90_000
DESK = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
# What each model writes is told by a word that says nothing to a rater; 40 answers to choose 20 of.
ROWS = [
    {
        "question": f"Question {i}? {EVIL}",
        "reference": f"Reference {i} {EVIL}",
        "base": f"heron {i} {EVIL}",
        "tuned": f"otter {i} {EVIL}\n\n  second line",
        "slice": "topic 0" if i % 2 == 0 else "topic 1",
    }
    for i in range(40)
]
# (preferred as clicked, scores of A, scores of B by the order of CRITERIA) of one sample
Said = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass
class Watched:
    """What went over the wire and what the page complained of."""

    urls: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def watch(self, page: Any) -> Any:
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("response", lambda response: self.bodies.append(_body(response)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        return page


def _body(response: Any) -> str:
    return response.text() if response.status == 200 else ""


@dataclass
class Rated:
    """How the two raters' session went."""

    ended: Ended
    results: dict[str, Any]
    key: dict[str, Any]
    shown: list[tuple[str, str, str]]  # question, answer A, answer B of each sample, as the page showed them
    said: dict[str, dict[int, Said]]
    watched: Watched
    address: str


def open_page(browser: Any, watched: Watched, **settings: Any) -> Any:
    context = browser.new_context(**settings)
    context.set_default_timeout(DEADLINE_MS)
    return watched.watch(context.new_page())


def start(page: Any, address: str, name: str) -> None:
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    page.locator("#work").wait_for()


def wait_saved(page: Any) -> None:
    page.locator("#saved", has_text="saved").and_(page.locator("#saved:not(:has-text('not'))")).wait_for()


def at(page: Any, number: int) -> None:
    page.get_by_text(f"Question {number} of {NUM_SAMPLES}", exact=True).wait_for()


def choices(seed: int, num_criteria: int) -> list[Said]:
    rng = random.Random(seed)

    def scores() -> tuple[int, ...]:
        return tuple(rng.randint(1, 5) for _ in range(num_criteria))

    return [(rng.choice(("a", "b", "same")), scores(), scores()) for _ in range(NUM_SAMPLES)]


def by_keys(page: Any, said: Said) -> None:
    """The preference, then A and B of each criterion: the frame moves by itself."""
    page.keyboard.press({"a": "a", "b": "B", "same": "s"}[said[0]])
    for a, b in zip(said[1], said[2], strict=True):
        page.keyboard.press(str(a))
        page.keyboard.press(str(b))


def by_taps(page: Any, said: Said) -> None:
    page.locator(f"[data-preferred={said[0]}]").tap()
    for side, scores in (("A", said[1]), ("B", said[2])):
        for name, value in zip(CRITERIA, scores, strict=False):
            page.get_by_role("group", name=f"{name} of answer {side}").get_by_role("button", name=str(value)).tap()


def pressed(page: Any) -> Said:
    """What the page shows as chosen."""
    found = page.eval_on_selector_all("[aria-pressed=true]", "all => all.map(e => ({...e.dataset}))")
    (preferred,) = [f["preferred"] for f in found if "preferred" in f]
    scores = {(f["side"], f["criterion"]): int(f["value"]) for f in found if "side" in f}
    a, b = (tuple(scores[side, name] for name in CRITERIA if (side, name) in scores) for side in "ab")
    return preferred, a, b


def rate_at_a_desk(browser: Any, address: str, watched: Watched) -> tuple[list[Said], list[tuple[str, str, str]]]:
    page = open_page(browser, watched, **DESK)
    start(page, address, "Ann")
    said, shown = choices(1, num_criteria=2), []
    for number, each in enumerate(said, 1):
        at(page, number)
        shown.append(tuple(page.locator(f"#{name}").text_content() for name in ("question", "a", "b")))
        by_keys(page, each)
        if number == 8:  # scored and not gone on: a reload changes nothing
            wait_saved(page)
            page.reload()
            at(page, 8)
            assert pressed(page) == each
        page.keyboard.press("Enter" if number % 2 else "ArrowRight")
    page.get_by_text("all answered, thank you").wait_for()
    wait_saved(page)
    assert page.evaluate("window.hit") is None, "an answer ran as code"
    return said, shown


def rate_on_a_phone(browser: Any, address: str, watched: Watched) -> list[Said]:
    page = open_page(browser, watched, **PHONE)
    start(page, address, "Bob")
    said = choices(2, num_criteria=1)
    for number, each in enumerate(said, 1):
        at(page, number)
        by_taps(page, each)
        if number == 10:
            wait_saved(page)
            page = open_page(browser, watched, **PHONE)
            start(page, address, "Bob")  # in another browser, under the same name
            at(page, 11)
            page.get_by_role("button", name="Back").tap()
            at(page, 10)
            assert pressed(page) == each
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["viewport"]["width"], "the page is wider than the phone"
        page.get_by_role("button", name="Next").tap() if number < NUM_SAMPLES else None
    page.locator("[data-preferred=a]").tap()  # a change of mind about the last one
    said[-1] = ("a", *said[-1][1:])
    wait_saved(page)
    return said


@pytest.fixture(scope="module")
def rated(place: Place) -> Rated:
    evaluate = place.directory / "runs/tiny/evaluate"
    evaluate.mkdir(parents=True)
    (evaluate / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = place.write(evaluate__human={"samples": NUM_SAMPLES, "criteria": list(CRITERIA)})
    with chromium() as browser:
        command = place.start("evaluate", "human", run, "--port", "0")
        command.wait_for("Ctrl-C ends")
        address = command.text.split("open ")[1].split()[0]
        watched = Watched()
        ann, shown = rate_at_a_desk(browser, address, watched)
        bob = rate_on_a_phone(browser, address, watched)
        ended = end(command)
    said = {"Ann": dict(enumerate(ann, 1)), "Bob": dict(enumerate(bob, 1))}
    results, key = (json.loads((evaluate / f"human/{name}.json").read_text()) for name in ("results", "key"))
    return Rated(ended, results, key, shown, said, watched, address)


def end(command: Command) -> Ended:
    command.process.send_signal(signal.SIGINT)
    return command.wait()


def tuned_side(sample: tuple[str, str, str]) -> str:
    assert ("otter" in sample[1]) != ("otter" in sample[2])
    return "a" if "otter" in sample[1] else "b"


def test_results_are_what_was_clicked(rated: Rated) -> None:
    assert rated.ended.code == 0
    sides = [tuned_side(sample) for sample in rated.shown]
    points = {
        n: [0.5 if said[n][0] == "same" else float(said[n][0] == sides[n - 1]) for said in rated.said.values()]
        for n in range(1, NUM_SAMPLES + 1)
    }
    flat = [p for both in points.values() for p in both]
    counted = {"wins": flat.count(1), "ties": flat.count(0.5), "losses": flat.count(0)}
    assert {name: rated.results[name] for name in counted} == counted
    assert rated.results["raters"] == {"Ann": NUM_SAMPLES, "Bob": NUM_SAMPLES}
    assert rated.results["win_rate"]["value"] == pytest.approx(fmean(flat))
    assert rated.results["win_rate"]["num"] == NUM_SAMPLES
    for place, name in enumerate(CRITERIA):
        scores: dict[str, list[int]] = {"base": [], "tuned": []}
        for said in rated.said.values():
            for n, (_, a, b) in said.items():
                if place >= len(a):
                    continue
                scores["tuned"].append((a if sides[n - 1] == "a" else b)[place])
                scores["base"].append((b if sides[n - 1] == "a" else a)[place])
        found = rated.results["criteria"][name]
        assert (found["base"], found["tuned"]) == pytest.approx((fmean(scores["base"]), fmean(scores["tuned"])))
        assert found["change"]["value"] == pytest.approx(found["tuned"] - found["base"])
    assert rated.results["num_shared"] == NUM_SAMPLES
    for line in ("human evaluation of 20 samples; answers: Ann 20, Bob 20", "agreement on the better answer: "):
        assert rated.ended.line(line)


def test_both_raters_saw_the_sheet_that_the_key_belongs_to_balanced(rated: Rated) -> None:
    sides = [tuned_side(sample) for sample in rated.shown]
    assert sides == rated.key["tuned"]
    assert sides.count("a") == NUM_SAMPLES // 2
    assert len({sample[0] for sample in rated.shown}) == NUM_SAMPLES
    texts = {row["question"]: row for row in ROWS}
    assert all({a, b} == {texts[q]["base"], texts[q]["tuned"]} for q, a, b in rated.shown), "a text was changed"
    assert rated.key["slices"].count("topic 0") == NUM_SAMPLES // 2
    assert set(rated.results["slices"]) == {"topic 0", "topic 1"}


def test_the_browser_never_learned_which_side_is_which(rated: Rated) -> None:
    sheets = [json.loads(body) for body in rated.watched.bodies if body.startswith("{")]
    assert len(sheets) >= 4
    for sheet in sheets:
        assert set(sheet) == {"criteria", "samples", "answers"}
        assert all(set(sample) == {"question", "reference", "a", "b"} for sample in sheet["samples"])
    everything = "".join(rated.watched.bodies)
    assert "otter" in everything
    for secret in ("tuned", 'base"', 'slice"', "topic"):
        assert secret not in everything


def test_the_page_asks_nobody_else_and_has_no_complaint(rated: Rated) -> None:
    assert [url for url in rated.watched.urls if not url.startswith((rated.address, "data:"))] == []
    assert len(rated.watched.urls) > 2 * NUM_SAMPLES
    assert rated.watched.complaints == []
