"""Signals that come while a block runs that must not be interrupted."""

import signal

import pytest

from ftray.errors import Preempted
from ftray.session import signals_later


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
