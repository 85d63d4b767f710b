"""How a run's time was spent: sessions, failures, recoveries, goodput and cost, from events and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ftray.console import duration
from ftray.events.event_log import LoggedEvent
from ftray.events.types import (
    AlertRaised,
    GroupFailed,
    GroupLeft,
    GroupNotPlaced,
    SessionEnded,
    SessionStarted,
    TrainingStarted,
    WeightsRewound,
)

GAP_S = 1.0  # shorter gaps between two drivers are not listed
Line = Mapping[str, Any]


@dataclass(frozen=True)
class DriverSession:
    """The time of one driver process. how: finished, interrupted, preempted, taken over, failed, or "" if unknown."""

    began_s: float
    ended_s: float
    how: str
    events: tuple[LoggedEvent, ...]

    @property
    def worker_s(self) -> float:
        """Worker seconds; the time before the first worker group counts with its size."""
        starts = [(e.unix_s, e.event.workers) for e in self.events if isinstance(e.event, TrainingStarted)]
        if not starts:
            return 0.0
        times = [self.began_s, *(unix_s for unix_s, _ in starts[1:]), self.ended_s]
        return sum(
            (until - since) * workers for (_, workers), since, until in zip(starts, times, times[1:], strict=False)
        )


@dataclass(frozen=True)
class RunHistory:
    """The sessions of a run. productive_s: seconds in committed steps."""

    sessions: tuple[DriverSession, ...]
    productive_s: float

    @property
    def running_s(self) -> float:
        """Seconds with a running driver, from the index to the end."""
        return sum(s.ended_s - s.began_s for s in self.sessions)

    @property
    def goodput(self) -> float | None:
        """Share of the running time in committed steps."""
        return min(1.0, self.productive_s / self.running_s) if self.running_s > 0 else None

    @property
    def events(self) -> list[LoggedEvent]:
        """All events, oldest first."""
        return [event for session in self.sessions for event in session.events]

    @property
    def num_failures(self) -> int:
        """Lost worker groups, and drivers that died."""
        lost = sum(isinstance(e.event, GroupFailed) for e in self.events)
        return lost + sum(not s.how for s in self.sessions[:-1])

    def cost(self, price_per_hour: float) -> float:
        """Cost of all worker time at this price per worker hour."""
        return price_per_hour * sum(s.worker_s for s in self.sessions) / 3600


def history_of(events: Sequence[LoggedEvent], lines: Sequence[Line]) -> RunHistory:
    """Sessions in order. A driver that left no end (it was killed, or still runs) ends with its last sign of life."""
    names = list(dict.fromkeys(e.session for e in events))
    begins = [next(e.unix_s for e in events if e.session == name) for name in names] + [math.inf]
    signs = [float(line["unix_s"]) for line in lines if "unix_s" in line]
    sessions = []
    for number, name in enumerate(names):
        own = tuple(e for e in events if e.session == name)
        last = own[-1]
        how = last.event.how if isinstance(last.event, SessionEnded) else ""
        seen = [at for at in signs if begins[number] <= at < begins[number + 1]]
        ended_s = last.unix_s if how else max([last.unix_s, *seen])
        sessions.append(DriverSession(begins[number], ended_s, how, own))
    productive_s = sum(line["num_tokens"] / line["tokens_per_s"] for line in lines if line.get("tokens_per_s"))
    return RunHistory(tuple(sessions), productive_s)


def as_rows(history: RunHistory) -> list[list[str]]:
    """(time, what happened) of everything, in words."""
    rows = []
    for number, session in enumerate(history.sessions):
        before = history.sessions[number - 1] if number else None
        if before is not None and (gap := session.began_s - before.ended_s) >= GAP_S:
            rows.append([_time(before.ended_s), f"nothing trained for {duration(gap)}"])
        for place, event in enumerate(session.events):
            rows.append([_time(event.unix_s), _words(event, session.events[place + 1 :])])
        if not session.how:
            last = number == len(history.sessions) - 1
            rows.append([_time(session.ended_s), f"last sign of this command{'' if last else '; it was killed'}"])
    return rows


def _words(logged: LoggedEvent, later: Sequence[LoggedEvent]) -> str:
    match logged.event:
        case SessionStarted(step=step, host=host):
            return f"a command took the run up at step {step} on {host}"
        case TrainingStarted(step=step, workers=workers, device=device):
            return f"{workers} worker{'s' if workers != 1 else ''} ({device}) began at step {step}"
        case GroupFailed():
            return _failure(logged.unix_s, logged.event, later)
        case WeightsRewound(to=to):
            return f"weights and optimizer were restored from step {to}"
        case AlertRaised(step=step, text=text):
            return f"alert at step {step}: {text}"
        case SessionEnded(how=how, why=why):
            return how + (f": {why}" if why else "")
        case GroupLeft(why=why) | GroupNotPlaced(why=why):
            return f"{logged.event.name}: {why}"
    return logged.event.name


def _failure(unix_s: float, event: GroupFailed, later: Sequence[LoggedEvent]) -> str:
    words = f"failure{'' if event.step is None else f' after step {event.step}'}: {event.why}"
    for again in later:
        if isinstance(again.event, TrainingStarted):
            step = again.event.step
            words += f"; training continued {duration(again.unix_s - unix_s)} later at step {step}"
            repeated = 0 if event.step is None else event.step - step
            return f"{words}: {repeated} step{'s' if repeated != 1 else ''} done again" if repeated > 0 else words
    return words


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
