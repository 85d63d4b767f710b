"""Signals that ask a command to end, handled alike by every command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def termination_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, and SIGHUP of a closed terminal unless the command ignores it (nohup)."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, signal.SIGHUP)


def is_termination(number: int) -> bool:
    """Whether a signal means that the machine or terminal goes away, unlike Ctrl-C."""
    return number in (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signal_handler(handler: Callable[[int, Any], object], numbers: Iterable[int]) -> Iterator[None]:
    """Handles signals with `handler` inside the block, then restores the handlers before it.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            if before is not None:  # a handler that Python did not install can't be restored
                signal.signal(number, before)


_received: list[int] = []


def received_signals() -> list[int]:
    """The signals that `interrupted_by_signals` has received so far, first one first."""
    return list(_received)


@contextmanager
def interrupted_by_signals() -> Iterator[list[int]]:
    """Inside the block, Ctrl-C and the termination signals raise KeyboardInterrupt; yields the signals received.

    It is KeyboardInterrupt for all of them because Ray, like other compiled modules, prints and drops any other exception
    of a signal handler. Even that one is dropped in callbacks of the garbage collector, so long phases that handle signals
    themselves start with `received_signals`.
    """
    _received.clear()

    def interrupt(number: int, _: Any) -> None:
        _received.append(number)
        raise KeyboardInterrupt(f"signal {number}")

    numbers = list(termination_signals())
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    with signal_handler(interrupt, numbers):
        yield _received


@contextmanager
def stop_event() -> Iterator[threading.Event]:
    """An event that SIGINT and the termination signals set. A second signal raises KeyboardInterrupt."""
    event = threading.Event()
    if _received:
        event.set()

    def stop(number: int, _: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt(f"second signal ({number})")
        event.set()

    with signal_handler(stop, (*termination_signals(), signal.SIGINT)):
        yield event
