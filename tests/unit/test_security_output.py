"""Foreign text where people look: terminals, spreadsheets, model cards; and a token's way to another machine."""

import csv
import io
import random

import pytest

from ftray.cli import main
from ftray.cluster.jobs import JobClient
from ftray.console import Console, printable
from ftray.errors import ConfigError
from ftray.evaluate.human.answers import to_csv
from ftray.evaluate.human.sheet import Sheet, SheetItem
from ftray.report.model_card import code_span, escaped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Hgone", "gone"),
        ("\x1b]0;title\x07ok", "ok"),
        ("\x1b]8;;https://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;cm0gLXJm\x07clipboard", "clipboard"),
        ("\x1bPq#0;2;0;0;0\x1b\\sixel", "sixel"),
        ("\x9b31mC1\x9d0;t\x9c", "C1"),
        ("progress 1%\rprogress 2%\r\nend", "progress 1%\nprogress 2%\nend"),
        ("a\x08\x08\x07\x00\x7fb", "ab"),
        ("abc\u202etxt.exe", "abctxt.exe"),
        ("x\u200by\ufeff\U000e0041", "xy"),
        ("\x1b", ""),
        ("\x1b[", ""),
        ("half \ud800", "half ?"),
        ("tab\té 日本 🐦", "tab\té 日本 🐦"),
    ],
)
def test_a_terminal_gets_no_command_from_foreign_text(text: str, shown: str) -> None:
    assert printable(text) == shown
    out = io.StringIO()
    Console(out).say(text)
    assert out.getvalue() == f"{shown}\n"


def test_no_mix_of_sequences_leaves_a_control_character() -> None:
    rng = random.Random(1)
    pieces = ["\x1b", "[", "]", "P", "\\", "\x07", "\x9b", "\x9d", "31m", ";", "a", "\n", "\r", "\x00", "\u202e"]
    for _ in range(3000):
        shown = printable("".join(rng.choices(pieces, k=rng.randint(1, 12))))
        assert not {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n", "\t"}, repr(shown)
        assert "\u202e" not in shown


def test_an_error_that_quotes_foreign_text_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check", "no\x1b[31m\x1b]0;x\x07where.yaml"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.fixture(autouse=True)
def auth_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """`JobClient` sets the mode where a token is set: with both calls the variable is gone again after the test."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_MODE")


@pytest.mark.parametrize(
    "address",
    [
        "http://10.0.0.5:8265",
        "head:8265",
        "http://head.example:8265",
        "http://127.0.0.1.evil:80",
        "http://[2001:db8::1]:8265",
    ],
)
def test_a_token_is_not_sent_in_plain_text(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret-token")
    with pytest.raises(
        ConfigError, match=r"in plain text .*http://127\.0\.0\.1:8265, use https, or add --insecure"
    ) as refused:
        JobClient(address)
    assert "very-secret-token" not in str(refused.value)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9", "http://localhost:9", "http://[::1]:9", "https://127.0.0.1:9"]
)
def test_a_token_may_go_over_loopback_and_https(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret-token")
    with pytest.raises(ConfigError, match="nobody answers"):
        JobClient(address)


def test_without_a_token_or_with_the_flag_http_is_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftray.network.CONNECT_S", 0.05)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="nobody answers"):
        JobClient("http://192.0.2.1:9")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret-token")
    assert main.main(["status", "--address", "http://192.0.2.1:9"]) == 2
    assert "--insecure" in capsys.readouterr().err
    assert main.main(["status", "--address", "http://192.0.2.1:9", "--insecure"]) == 2
    assert "nobody answers" in capsys.readouterr().err


FORMULAS = [
    "=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1", "  \n =1", "＝1", "＋1", "－1", "＠x", "\u00a0=1",
    "\u200b=1", "\ufeff=1", "\x00=1", "\u3000＝1", "|x", "%x", "\u2212" + "1", "﹢1", "﹦1",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_the_sheet_is_a_formula(text: str) -> None:
    sheet = Sheet("id", ["helpful"], [SheetItem(text, text, text, text)])
    rows = list(csv.reader(io.StringIO(to_csv(sheet).decode("utf-8-sig"), newline="")))
    assert rows[1][2:6] == [f"'{text}"] * 4


@pytest.mark.parametrize("text", ["plain", "a=1", "2-1", "x\n=1", "", "é", "(=1)", "'=1"])
def test_other_cells_stay_as_they_are(text: str) -> None:
    sheet = Sheet("id", [], [SheetItem(text, text, text, text)])
    rows = list(csv.reader(io.StringIO(to_csv(sheet).decode("utf-8-sig"), newline="")))
    assert rows[1][2:6] == [text] * 4


HOSTILE = [
    "![x](https://evil/track.png)", "[click](javascript:alert(1))", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "a | b | c", "x\n\n# Licence: none", "x\n---\ny", "**bold** _it_ ~~s~~", "`code` ``more``", "https://evil.example/x",
    "www.evil.example", "&lt;b&gt; &#60;", "$x$", "\x1b[31mred", "\\", "````", "`",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_in_a_card_is_only_shown(text: str) -> None:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    plain = " ".join(printable(text).split())
    document = f"| a | b |\n|---|---|\n| {escaped(text)} | {code_span(text)} |\n\n{escaped(text)} end\n"
    html = parser.render(document)
    assert html.count("<td>") == 2, html
    for tag in ("<script", "<img", "<a ", "<strong", "<em", "<s>", "<h1", "<hr"):
        assert tag not in html, html
    cells = parser.parse(document)
    texts = [
        "".join(child.content for child in token.children or [])
        for token in cells
        if token.type == "inline" and token.content not in ("a", "b")
    ]
    assert texts == [plain, plain.replace("|", "¦"), f"{plain} end"]
