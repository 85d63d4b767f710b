"""Which signals ask a command to end, so that every command treats them alike."""

from __future__ import annotations

import signal


def termination_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, and SIGHUP of a terminal that was closed, unless the command was started to outlive it (nohup)."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, signal.SIGHUP)


def is_termination(number: int) -> bool:
    """Whether a signal means that the machine or terminal goes away, and not that somebody pressed Ctrl-C."""
    return number in (signal.SIGTERM, signal.SIGHUP)
