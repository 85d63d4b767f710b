"""A run's report says what storage holds of it, in figures that can be checked by hand, and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import ftray.report.html as report_html
from ftray.cli import main
from ftray.console import Console
from ftray.data.preview import TokenSpan
from ftray.data.shown_records import ShownRecord
from ftray.driver.worker_group import GroupResult
from ftray.errors import ConfigError, Interrupted, RunError, StorageError
from ftray.events.bus import EventBus
from ftray.events.event_log import EventLog, read_events
from ftray.events.types import GroupFailed, GroupLeft, GroupNotPlaced, SessionEnded, TrainingStarted
from ftray.redact import redacted, redacted_tree
from ftray.report.goodput import as_rows, history_of
from ftray.report.gpu_specs import card_of
from ftray.report.html import HtmlTable, PlotAxis, Series, bars, chart, columns, render
from ftray.report.run_report import read_report_data, render_report, report_to, thinned, try_report, write_report
from ftray.train.checkpoint.catalog import read_metrics
from tests.events import step_finished
from tests.runs import BEGAN_S, line, with_two_kills, write_run, write_session

VOID = {"input", "meta"}


class Page(HTMLParser):
    """Checks that tags close in order; keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def charts(self) -> list[dict[str, Any]]:
        return [json.loads(a["data-chart"] or "") for _, a in self.tags if "data-chart" in a]


def test_goodput_cost_and_recoveries_of_a_run_with_two_kills(tmp_path: Path) -> None:
    _, run_dir = with_two_kills(tmp_path)
    found = history_of(read_events(str(run_dir)), read_metrics(str(run_dir)))
    first, second = found.sessions
    assert (first.how, second.how) == ("", "finished")
    assert first.ended_s - first.began_s == 69, "the last step's line is its last sign of life"
    assert second.ended_s - second.began_s == 40
    assert found.productive_s == 40
    assert found.goodput == pytest.approx(40 / 109)
    assert found.num_failures == 2
    assert found.cost(3.6) == pytest.approx(3.6 * (69 * 2 + 40 * 1) / 3600)
    words = [text for _, text in as_rows(found)]
    failure = "worker 1 on n2 was killed (SIGKILL); training continued 20 s later at step 20"
    assert f"failure after step 23: {failure}: 3 steps done again" in words
    assert "last sign of this command; it was killed" in words
    assert "nothing trained for 60 min" in words or "nothing trained for 1 h 0 min" in words
    assert "alert at step 18: the loss jumped and came back" in words
    assert words[-1] == "finished"
    assert as_rows(found)[0][0] == "2027-01-15 08:00:00"


def test_the_page_holds_all_parts_and_asks_for_nothing(tmp_path: Path) -> None:
    run, run_dir = with_two_kills(tmp_path)
    text = render_report(read_report_data(run, str(run_dir)))
    page = Page(text)
    assert not {"link", "img", "iframe", "a"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "onload", "onclick"} & {name for _, attributes in page.tags for name in attributes}
    static = Path(report_html.__file__).with_name("static")
    assert page.scripts == [(static / name).read_text() for name in ("uplot/uPlot.iife.min.js", "curves.js")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'"
    assert policy in [attributes.get("content") for _, attributes in page.tags], "no other script may run"
    rest = text.replace(page.scripts[0], "").replace(page.scripts[1], "")
    assert not re.search(r"https?:|url\(|@import|\bnan\b", rest)
    for words in (
        "trained to the end, 40 steps",
        "2.4076 → 0.5168 (means",
        "40,000 tokens in 40 steps",
        "best 0.4194, at step 40",
        "the tuned model is better",
        "1 min 49 s, of which 40 s (37%, the goodput) in committed steps; 2 failures",
        "0.18 for training, at 3.6 per worker hour",
        "step 18: the loss jumped and came back",
        "<script>alert(1)</script>",
        "eval loss",
        "-50.0%",
        "1 × NVIDIA H200, 2 × NVIDIA H200",
        "ftray 0.1.0, torch 2.13.0",
        "num_workers: 2",
    ):
        assert words in page.text, words
    parts = ["Alerts", "Training", "Evaluation", "History", "Environment", "Settings"]
    assert [title for title in page.texts if title in parts] == parts
    titles = [[series["label"] for series in each["series"]] for each in page.charts]
    assert titles == [
        ["training", "eval"],
        ["learning rate"],
        ["gradient norm"],
        ["tokens per second"],
        ["seconds per step"],
    ]
    assert all(each["x_title"] == "step" and each["y_title"] for each in page.charts)
    assert sum(value is not None for value in page.charts[0]["series"][1]["values"]) == 4, "eval losses"
    assert page.text.count(" over 40 steps: first ") == 5, "each chart in words"


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([4.0, 2.0], "4.0000 → 2.0000"),
        ([4.0, 3.0, 9.0, 2.0, 1.0], "3.5000 → 1.5000 (means of the first and last 2 steps)"),
        ([5.0, 3.0] * 10 + [2.0, 1.0] * 5, "4.0000 → 1.5000 (means of the first and last 10 steps)"),
    ],
)
def test_the_loss_of_one_step_is_not_the_headline(tmp_path: Path, losses: list[float], told: str) -> None:
    run, run_dir = write_run(tmp_path, [line(n, loss, BEGAN_S + n) for n, loss in enumerate(losses)])
    assert told in render_report(read_report_data(run, str(run_dir)))


def test_no_password_or_key_of_an_address_is_shown(tmp_path: Path) -> None:
    run, run_dir = with_two_kills(tmp_path)
    text = render_report(read_report_data(run, str(run_dir)))
    assert "hunter2" not in text
    assert "s3://…@bucket/data" in text
    assert redacted("at https://x.org/a?X-Amz-Signature=abc&y=1&amp;token=s3cr3t") == (
        "at https://x.org/a?X-Amz-Signature=…&y=1&amp;token=…"
    )
    assert redacted("sorted(x, key=len) --set method.num_virtual_tokens=20") == (
        "sorted(x, key=len) --set method.num_virtual_tokens=20"
    )
    kept = redacted_tree({"why": [f"Bearer {'a' * 20}", f"hf_{'b' * 30} AKIA{'C' * 16}", 'say key="x"', 3]})
    assert kept == {"why": ["Bearer …", "… …", 'say key="x"', 3]}


def test_a_secret_with_quotes_is_removed_from_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_PASSWORD", 'it\'s "quoted" & <kept>')
    run, run_dir = with_two_kills(tmp_path)
    data = read_report_data(run, str(run_dir))
    data = replace(data, identity={**data.identity, "parent": 's3://b/it\'s "quoted" & <kept>'})
    assert "s3://b/…" in render_report(data)


def test_no_secret_is_in_a_traceback_an_error_or_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run_dir = with_two_kills(tmp_path)
    secrets = {"MY_TOKEN": "canary of one's own 0123", "HF_TOKEN": f"hf_{'canary' * 6}"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    text = f"at s3://ann:canary-word@b/x with {' and '.join(secrets.values())}"
    for fault, code in ((RuntimeError(text), 1), (RunError(text), 1), (ConfigError(text), 2)):
        monkeypatch.setattr("ftray.report.run_report.report_to", lambda *_, fault=fault: raise_(fault))
        assert main.main(["report", str(run_dir)]) == code
        said = "".join(capsys.readouterr())
        assert "at s3://…@b/x with … and …" in said
        assert "canary" not in said
        assert ("Traceback" in said) == isinstance(fault, RuntimeError)
    with pytest.raises(RunError), EventLog(str(tmp_path / "told"), lambda: True).session(0):
        raise RunError(text)
    (file,) = (tmp_path / "told/events").iterdir()
    assert "canary" not in file.read_text()


def raise_(fault: Exception) -> None:
    raise fault


def test_a_run_that_has_hardly_begun_and_one_that_was_stopped_have_their_page(tmp_path: Path) -> None:
    run, run_dir = write_run(tmp_path, [line(n, 2.0, BEGAN_S + n) for n in range(3)])
    write_session(run_dir, "1", [(0, "began", {"step": 0}), (5, "ended", {"how": "interrupted", "why": "Ctrl-C"})])
    assert "interrupted at step 3; the same command continues it" in Page(write_and_read(run, run_dir)).text
    (run_dir / "checkpoints").rename(run_dir / "gone")
    assert "started, without a checkpoint yet" in Page(write_and_read(run, run_dir)).text
    (run_dir / "run.json").unlink()
    with pytest.raises(ConfigError, match="train first"):
        write_report(run, str(run_dir))


def write_and_read(run: object, run_dir: Path) -> str:
    return Path(write_report(run, str(run_dir))).read_text()  # type: ignore[arg-type]


def test_a_report_that_can_t_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, run_dir = with_two_kills(tmp_path)
    (run_dir / "report.html").mkdir()
    try_report(run, str(run_dir), Console())
    assert "warning: report.html was not written (StorageError" in capsys.readouterr().out
    with pytest.raises(StorageError):
        report_to(run, str(run_dir), Console(), None)


def test_a_signal_while_the_report_is_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, run_dir = with_two_kills(tmp_path)

    def preempt(*_: object) -> None:
        raise KeyboardInterrupt  # as `interrupted_by_signals` does

    monkeypatch.setattr("ftray.report.run_report.render_report", preempt)
    with pytest.raises(KeyboardInterrupt):
        try_report(run, str(run_dir), Console())


def test_other_settings_than_the_runs_are_not_shown_as_its_own(tmp_path: Path) -> None:
    run, run_dir = with_two_kills(tmp_path)
    other = run.model_copy(update={"train": run.train.model_copy(update={"learning_rate": 0.123})})
    with pytest.raises(ConfigError, match=r"train\.learning_rate"):
        write_report(other, str(run_dir))


def live_until_interrupted(journal: EventLog) -> None:
    with journal.session(7):
        bus = EventBus()
        journal.subscribe(bus)
        bus.emit(TrainingStarted(7, 9, 2, "CPU"))
        bus.emit(step_finished(7))
        for result in (
            GroupResult(False, failure="lost"),
            GroupResult(False, not_placed=True, failure="nothing free"),
            GroupResult(False, stop_reason="the cluster has room for 4 workers"),
            GroupResult(True),
        ):
            journal.group_ended(result.event_type, result.why)
        raise Interrupted("interrupted; again")


def test_a_journal_keeps_starts_failures_and_the_end_and_writes_nothing_once_overtaken(tmp_path: Path) -> None:
    clock = iter(range(100, 200))
    mine = [True]
    journal = EventLog(str(tmp_path), lambda: mine[0], lambda: float(next(clock)))
    with pytest.raises(Interrupted):
        live_until_interrupted(journal)
    found = read_events(str(tmp_path))
    assert [e.event for e in found[1:]] == [
        TrainingStarted(7, 9, 2, "CPU"),
        GroupFailed("lost", 8),
        GroupNotPlaced("nothing free"),
        GroupLeft("the cluster has room for 4 workers"),
        SessionEnded("interrupted", "interrupted; again"),
    ]
    assert [e.event.name for e in found] == ["began", "start", "failed", "no room", "left", "ended"], "in the file"
    assert [e.unix_s for e in found] == sorted(e.unix_s for e in found)
    mine[0] = False
    with pytest.raises(RunError), journal.session(7):
        raise RunError("no")
    assert len(read_events(str(tmp_path))) == 6
    (file,) = (tmp_path / "events").iterdir()
    file.write_text(file.read_text() + "{torn\n")
    assert len(read_events(str(tmp_path))) == 6


def test_metrics_of_a_run_that_still_trains_are_its_committed_segments(tmp_path: Path) -> None:
    _, run_dir = write_run(tmp_path, [line(n, 2.0, BEGAN_S) for n in range(3)])
    assert [found["step"] for found in read_metrics(str(run_dir))] == [0, 1, 2]
    assert not (run_dir / "metrics.jsonl").exists()
    (run_dir / "metrics.jsonl").write_text(json.dumps(line(0, 1.0, 0)) + "\n")
    assert len(read_metrics(str(run_dir))) == 3


def test_long_curves_are_averaged_and_keep_their_ends_in_order() -> None:
    points = [(n / 1001, float(n)) for n in range(1001)]
    found = thinned(points, 100)
    assert len(found) == 91
    assert found[0] == (pytest.approx(5 / 1001), 5.0)
    assert [y for _, y in found] == sorted(y for _, y in found)
    assert thinned(points[:7], 100) == points[:7]


def test_a_chart_joins_its_curves_over_one_axis_and_is_none_without_points() -> None:
    assert chart("t", "x", "y", [Series("a", [])], "") is columns("t", [], "x") is bars("t", [], "{}") is None
    made = chart("t", "x", "y", [Series("a<b", [(1, 1.0), (3, 2.0)]), Series("c", [(2, 1.0)], dash=(7, 4))], "s")
    assert made is not None
    tree = json.loads(made.json)
    assert (tree["x"], tree["is_log"]) == ([1, 2, 3], False)
    assert [each["values"] for each in tree["series"]] == [[1, None, 2], [None, 1, None]]
    assert [each["points"] for each in tree["series"]] == [False, True], "a single point has a mark"
    wide = chart("t", "x", "y", [Series("a", [(0, 1.0), (1, 1000.0)])], "")
    assert wide is not None
    assert json.loads(wide.json)["is_log"]


def test_an_axis_places_numbers_by_size_and_names_them_briefly() -> None:
    assert PlotAxis([1.0, 1000.0]).place(31.6) == pytest.approx(0.5, abs=1e-3), "magnitudes"
    assert PlotAxis([1.0, 3.0]).place(2.0) == 0.5
    numbers = {
        v: PlotAxis([v, 0.0]).ticks()[v > 0][1] for v in (2.08e-6, 1.02e-4, 2e-4, 0.00102, 13_497.0, 1_234_567.0, 1e10)
    }
    assert list(numbers.values()) == ["2.08e-6", "1.02e-4", "2e-4", "0.00102", "13,497", "1.23e6", "1e10"]


def test_templates_escape_every_text_also_in_attributes_and_charts() -> None:
    evil = "\"'><script>alert(1)</script>"
    values = {"level": 2, "note": evil, "warnings": [evil], "sources": HtmlTable(evil, [evil], [[evil]], best=0)}
    plots = [columns(evil, [(evil, 1)], evil), bars(evil, [(evil, 1.0)], "{}")]
    split = {"title": evil, "facts": [(evil, evil)], "plots": plots}
    record = ShownRecord(evil, evil, [[TokenSpan(evil, "trained", trained=True)]])
    text = render("data.html", splits=[split], records=[record], **values)
    made = chart(evil, evil, evil, [Series(evil, [(0, 1.0)])], evil)
    text += render("sweep.html", level=2, best=evil, command=evil, parallel=plots[0], chart=made, importance=None,
                   trials=values["sources"])  # fmt: skip
    assert "<script" not in text
    assert html.unescape(text).count("<script>") > 20
    (tree,) = Page(f"<div>{text}</div>").charts
    assert tree["series"][0]["label"] == tree["x_title"] == evil


def begun_on(storage_dir: Path, *devices: tuple[str, int], **sections: Any) -> str:
    """The page of a run of 3 steps at 40,000 tokens a second, its groups on these (device, workers)."""
    lines_of = [line(n, 2.0, BEGAN_S + n, tokens_per_s=40_000.0 + (n == 0) * 9e9) for n in range(3)]
    run, run_dir = write_run(storage_dir, lines_of, **sections)
    starts = [(n, "start", {"step": 0, "workers": size, "device": name}) for n, (name, size) in enumerate(devices)]
    write_session(run_dir, "1-a", [(0, "began", {"step": 0, "host": "n1", "pid": 1}), *starts])
    return render_report(read_report_data(run, str(run_dir)))


def test_mfu_is_by_the_formula_of_the_docs(tmp_path: Path) -> None:
    """Llama-3.2-1B by hand: 973,078,528 weights in layers, 262,668,288 in the head, 11,272,192 in a LoRA of rank 16."""
    model = {"model": {"base": "meta-llama/Llama-3.2-1B"}, "train": {"global_batch_size": 4, "max_steps": 3}}
    lora = begun_on(tmp_path / "lora", ("NVIDIA H200", 2), **model)
    share = (4 * 1_235_746_816 + 6 * 11_272_192) * 40_000 / (2 * 989e12)
    assert f"{share:.1%}: 40,000 tokens/s × 5.01 GFLOP over 2 × 989 TFLOP/s (H200, 16 bits, dense)" in lora
    full = begun_on(tmp_path / "full", ("NVIDIA H100 80GB HBM3", 2), method={"type": "full"}, **model)
    assert f"{6 * 1_235_746_816 * 40_000 / (2 * 989e12):.1%}: 40,000 tokens/s × 7.41 GFLOP" in full
    for name, devices in (("cpu", [("a CPU", 2)]), ("fewer", [("NVIDIA H200", 2), ("NVIDIA H200", 1)])):
        assert "MFU" not in begun_on(tmp_path / name, *devices, **model), name
    assert "MFU" not in begun_on(tmp_path / "unknown", ("NVIDIA H200", 2)), "nobody knows the shape of org/base"


def test_cards_are_known_by_what_drivers_call_them() -> None:
    names = {
        "NVIDIA H200": "H200",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-SXM4-80GB": "A100-80G",
        "NVIDIA A100 80GB PCIe": "A100-80G",
        "NVIDIA A100-SXM4-40GB": "A100-40G",
        "NVIDIA A10G": "A10G",
        "NVIDIA L4": "L4",
        "NVIDIA L40S": "L40S",
        "NVIDIA B200": "B200",
        "NVIDIA H100 PCIe": None,
        "NVIDIA H100 NVL": None,
        "NVIDIA A10": None,
        "NVIDIA L40": None,
        "NVIDIA GeForce RTX 4090": None,
        "cpu": None,
    }
    found = {name: card_of(name) for name in names}
    assert {name: card and card.name for name, card in found.items()} == names
