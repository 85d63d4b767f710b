"""The surroundings of a command: signals, a terminal that is closed, and a Ray or Serve whose start times out."""

import io
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
import ray
import ray.serve

from ftray.cli import session
from ftray.cli.session import signals_later
from ftray.console import Console
from ftray.driver.supervisor import stop_signals
from ftray.errors import Preempted, RunError
from ftray.serve.run import _start_serve
from ftray.signals import termination_signals


def test_a_signal_waits_for_the_end_of_the_block_and_is_not_lost() -> None:
    done = []

    def imports() -> None:
        with signals_later():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest of the import")

    kept = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        imports()
    assert done == ["the rest of the import"]
    assert signal.getsignal(signal.SIGINT) is kept


def test_the_handler_of_before_is_the_one_that_hears_of_it() -> None:
    def preempted(*_: object) -> None:
        raise Preempted("preempted")

    kept = signal.signal(signal.SIGTERM, preempted)
    try:
        with pytest.raises(Preempted), signals_later():
            signal.raise_signal(signal.SIGTERM)
        with signals_later():
            pass
        assert signal.getsignal(signal.SIGTERM) is preempted
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_what_the_block_raises_comes_first() -> None:
    def imports() -> None:
        with signals_later():
            signal.raise_signal(signal.SIGINT)
            raise ImportError

    with pytest.raises(ImportError):
        imports()


@pytest.fixture
def quiet_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(io.StringIO())
    monkeypatch.setattr(session, "_told", (console, str(tmp_path / "ftray.log")))
    return console


def test_a_ray_that_times_out_at_its_start_is_tried_again_and_leaves_no_process(
    quiet_console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def init(**_: object) -> None:
        started.append(subprocess.Popen(["sleep", "600"]))
        if len(started) < 3:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    try:
        session._start_local(2)
        text = quiet_console._stream.getvalue()
        assert "Ray did not start (The current node timed out during startup.); trying again (2 of 3)" in text
        assert "trying again (3 of 3)" in text
        assert [process.poll() is None for process in started] == [False, False, True]
    finally:
        started[-1].kill()


def test_a_ray_that_never_starts_is_one_sentence_with_the_logs(
    quiet_console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise TimeoutError("no raylet")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RunError) as caught:
        session._start_local(2)
    said = str(caught.value)
    assert said.startswith("Ray did not start in 3 tries (no raylet)")
    assert str(tmp_path / "ftray.log") in said
    assert said.endswith("run the same command again to continue")


def test_a_signal_while_ray_starts_is_no_failure_of_its_start(
    quiet_console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise KeyboardInterrupt  # as `interrupted_by_signals` does

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        session._start_local(2)


def test_a_serve_that_times_out_at_its_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def start(**_: object) -> None:
        calls.append("start")
        if len(calls) < 3:
            raise TimeoutError("the proxy is not ready")

    monkeypatch.setattr(ray.serve, "start", start)
    monkeypatch.setattr(ray.serve, "shutdown", lambda: calls.append("shutdown"))
    warnings: list[str] = []
    _start_serve({}, None, warnings.append)
    assert calls == ["start", "shutdown", "start"]
    assert warnings == ["Ray Serve did not start (the proxy is not ready); trying again (2 of 3)"]
    monkeypatch.setattr(ray.serve, "shutdown", lambda: None)
    monkeypatch.setattr(ray.serve, "start", init_that_times_out)
    with pytest.raises(RunError, match=r"^Ray Serve did not start in 3 tries \(too slow\); its logs are in"):
        _start_serve({}, None, warnings.append)


def init_that_times_out(**_: object) -> None:
    raise TimeoutError("too slow")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_a_command_unless_it_was_started_with_nohup(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        assert termination_signals() == ((signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP))
        with stop_signals(Console(io.StringIO())) as caught:
            signal.raise_signal(signal.SIGHUP)
        assert caught == ([] if ignored else [signal.SIGHUP])
        assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == ignored
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_written_to_a_terminal_that_was_closed_is_dropped() -> None:
    keyboard, screen = pty.openpty()
    with os.fdopen(screen, "w") as stream:
        console = Console(stream)
        console.say("before")
        os.close(keyboard)
        console.say("after")
        with console.progress("step", 3) as bar:
            bar.update(1)
