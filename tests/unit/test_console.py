"""What the user sees, as text and as JSON: one object a line, and no secret in either."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from ftray import config, console
from ftray.cli import main
from ftray.errors import ConfigError
from ftray.redact import redacted
from tests.terminal import Terminal, screen

SECRET = "canary/of+the/secret/access/key"


def test_lines_of_json_tell_run_rank_and_step_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.0)
    out = io.StringIO()
    told = console.Console(out, as_json=True)
    told.say("before")
    told.run, told.step = "tiny", 3
    told.say()
    told.say(f"two\nlines {SECRET}")
    told.warn("careful")
    told.event("step", rank=0, loss=math.nan, why=[SECRET])
    with told.progress("train: step", 9) as bar:
        bar.update(4, "loss 1")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert all(list(line)[:7] == ["time", "level", "run", "rank", "step", "event", "message"] for line in lines)
    keys = ("level", "run", "rank", "step", "event", "message")
    assert [tuple(line[key] for key in keys) for line in lines] == [
        ("info", None, None, None, "message", "before"),
        ("info", "tiny", None, 3, "message", "two\nlines …"),
        ("warning", "tiny", None, 3, "message", "careful"),
        ("info", "tiny", 0, 3, "step", ""),
        ("info", "tiny", None, 3, "progress", "train: step 4/9 · loss 1"),
    ]
    assert (lines[3]["loss"], lines[3]["why"]) == (None, ["…"])


def test_text_has_no_secret_and_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_API_KEY", "first-client,second-client")
    out = io.StringIO()
    told = console.Console(out)
    told.event("step", rank=0)
    told.say("second-client at s3://ann:hunter2@bucket")
    assert out.getvalue() == "… at s3://…@bucket\n"


def test_words_of_the_environment_that_only_sound_like_secrets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "parallel"),
        ("FTRAY_API_KEY_FILE", "/run/keys"),
        ("X_KEY", "short"),
    ):
        monkeypatch.setenv(name, value)
    assert redacted("parallel /run/keys short") == "parallel /run/keys short"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://ann:p@ss/w@host/db", "postgres://…@host/db"),
        ("http://127.0.0.1:9000/a@b", "http://127.0.0.1:9000/a@b"),
        ("https://x.org/a?keyword=banking&tokenizer=llama", "https://x.org/a?keyword=banking&tokenizer=llama"),
        ("https://x.org/a?sig=abc%3D&AWSAccessKeyId=AB1", "https://x.org/a?sig=…&AWSAccessKeyId=…"),
        ("sk-learn-classifier-of-topics", "sk-learn-classifier-of-topics"),
        ("use Bearer authentication", "use Bearer authentication"),
        ("correct horse staple", "…"),
        ("<a&b> 0123, &lt;a&amp;b&gt; 0123", "…, …"),
        ("sort by position", "sort by position"),
    ],
)
def test_what_is_secret_goes_and_what_only_looks_like_it_stays(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PGPASSWORD", "correct horse staple"), ("X_TOKEN", "<a&b> 0123"), ("SORT_KEY", "position")):
        monkeypatch.setenv(name, value)
    assert redacted(text) == shown


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("storage=s3://ann:hunter2@bucket/runs", "storage"),
        ("data.train.0.path=s3://b/a.jsonl?X-Amz-Signature=hunter2", "data.train.0.path"),
        ("model.base=hf_hunter2hunter2hunter2hunter2", "model.base"),
    ],
)
def test_a_secret_in_the_run_file_is_refused_by_its_key(override: str, key: str) -> None:
    file = Path(__file__).parents[2] / "jobs/quickstart.yaml"
    with pytest.raises(ConfigError, match=f": {key} holds a password or key, .* credentials come from the") as error:
        config.load_run(file, [override])
    assert "hunter2" not in str(error.value)


def test_the_variable_is_checked_and_answers_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FTRAY_LOG", "xml")
    assert main.main(["check", "--fast", "jobs/quickstart.yaml"]) == 2
    assert capsys.readouterr().err == "ftray: FTRAY_LOG is xml; use json, text, or unset it\n"
    monkeypatch.setenv("FTRAY_LOG", "json")
    assert main.main(["check", "--fast", "jobs/quickstart.yaml"]) == 0
    assert "config hash" in capsys.readouterr().out.splitlines()[0]
    assert main.main(["train", "no.yaml"]) == 2
    failed = json.loads(capsys.readouterr().err)
    assert (failed["level"], failed["event"], failed["exit_code"]) == ("error", "failed", 2)
    assert failed["message"].startswith("no.yaml does not exist")


def test_a_terminal_shows_a_bar_below_messages_and_a_pipe_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(console, "duration", lambda _: "0 s")
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("COLUMNS", "60")
    for stream in (Terminal(), io.StringIO()):
        out = console.Console(stream)
        with out.progress("train: step", 9) as bar:
            bar.update(3, "loss 2")
            out.warn(f"careful [red] {SECRET}")
            bar.update(4, f"loss 1 {SECRET}")
        out.table([["run", "loss"], ["a", "[b]1[/b]"]])
        text = stream.getvalue()
        assert SECRET not in text
        if isinstance(stream, Terminal):
            message, bar_line, *rows = screen(text)
            assert message == "warning: careful [red] …"
            assert bar_line.startswith("train: step 4/9 · loss 1 … · 0 s left ━")
            assert [row.split() for row in rows if row.strip(" ─")] == [["run", "loss"], ["a", "[b]1[/b]"]]
            assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is visible"
        else:
            first, warning, second, *rows = text.splitlines()
            assert (first, warning) == ("train: step 3/9 · loss 2", "warning: careful [red] …")
            assert second == "train: step 4/9 · loss 1 … · 0 s left"
            assert rows == ["run  loss", "a    [b]1[/b]"]
            assert "\x1b" not in text
