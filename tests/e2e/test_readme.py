"""What the README tells people to type works as it stands there.

A code block under the comment `<!-- test -->` is run, in the README's order, in one directory that holds jobs/. What the
comment says after a colon (`<!-- test: train.max_steps=2 -->`) is added to each `ftray run`, `train` and `evaluate`, so that
it is done in a minute. `<!-- test: serve=runs/x -->` above a Python block: that run is served, and the block's address is
replaced by the endpoint's. A block of `bash` is commands; of one of `console` those lines that begin with `$ `.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.e2e.command import Place

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"^<!-- test(?:: *([^\n]*?))? *-->\n+```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LENGTHENED = re.compile(r"\bftray (run|train|evaluate) ")


@dataclass(frozen=True)
class Block:
    """A marked block: its language, its text, and the words of its comment."""

    language: str
    text: str
    words: tuple[str, ...]

    def commands(self) -> list[str]:
        """What is to be typed: one command each, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        kept = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        return [f"{c} {shlex.join(self.words)}" if self.words and LENGTHENED.search(c) else c for c in kept]


def read_blocks(text: str) -> list[Block]:
    return [Block(m[2], m[3], tuple(shlex.split(m[1] or ""))) for m in BLOCK.finditer(text)]


BLOCKS = read_blocks(README.read_text(encoding="utf-8")) if README.exists() else []


@pytest.fixture(scope="module")
def readers_place(place: Place) -> Iterator[Place]:
    """A directory as a fresh clone is: jobs/ is there, `ftray` and `python` are on the path."""
    (place.directory / "jobs").symlink_to(ROOT / "jobs")
    place.env["PATH"] = f"{Path(sys.executable).parent}:{place.env.get('PATH', '')}"
    yield place
    assert place.left_over() == []


def test_blocks_are_read_as_the_convention_says() -> None:
    text = (
        "<!-- test: a.b=1 c='d e' -->\n```console\n$ ftray run x.yaml \\\n    y=2\nout\n$ ls\n```\n```bash\nno\n```\n"
    )
    text += "<!-- test -->\n\n```bash\n# why\nftray train x\n```\n"
    first, second = read_blocks(text)
    assert first.commands() == ["ftray run x.yaml      y=2 a.b=1 'c=d e'", "ls"]
    assert second.commands() == ["ftray train x"]


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_the_readme_has_commands_that_are_run() -> None:
    typed = " ".join(command for block in BLOCKS for command in block.commands())
    assert {"check", "train", "evaluate", "export"} <= set(re.findall(r"ftray (\w+)", typed))


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{number}-{block.language}", marks=[pytest.mark.long] if block.words else [])
        for number, block in enumerate(BLOCKS)
    ],
)
def test_a_block_works(block: Block, readers_place: Place) -> None:
    if block.language == "python":
        run_python(block, readers_place)
        return
    for command in block.commands():
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=readers_place.directory,
            env=readers_place.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr


def run_python(block: Block, place: Place) -> None:
    (word,) = block.words
    assert word.startswith("serve="), "a Python block names the run to be served: <!-- test: serve=runs/x -->"
    endpoint = place.start("serve", word.removeprefix("serve="), "serve.port=0")
    endpoint.wait_for("(Ctrl-C drains and stops)")
    url = re.search(r"serving \S+ at (\S+)", endpoint.text)
    assert url
    text, number = re.subn(r"http://127\.0\.0\.1:\d+/v1", url[1], block.text)
    assert number, "the block has no address to be replaced"
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=place.directory, env=place.env, capture_output=True, text=True
    )
    endpoint.process.send_signal(signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert endpoint.wait().code == 0


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_the_run_file_that_the_readme_shows_is_the_quickstarts() -> None:
    shown = re.findall(r"^```yaml\n(name: quickstart\n.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert [yaml.safe_load(text) for text in shown] == [yaml.safe_load((ROOT / "jobs/quickstart.yaml").read_text())]


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_what_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
