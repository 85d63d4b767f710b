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


@contextmanager
def stop_event() -> Iterator[threading.Event]:
    """An event that SIGINT and the termination signals set. A second signal raises KeyboardInterrupt."""
    event = threading.Event()

    def stop(number: int, _: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt(f"second signal ({number})")
        event.set()

    with signal_handler(stop, (*termination_signals(), signal.SIGINT)):
        yield event
