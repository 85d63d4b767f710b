"""How a run's time was spent: its drivers, failures and recoveries, goodput, cost. Pure functions of events and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ftray.console import duration
from ftray.events.event_log import LoggedEvent

GAP_S = 1.0  # between two drivers, from which on it is told
Line = Mapping[str, Any]


@dataclass(frozen=True)
class DriverSession:
    """One driver's time. how: finished, interrupted, preempted, taken over, failed; "" where its end is not known."""

    began_s: float
    ended_s: float
    how: str
    events: tuple[LoggedEvent, ...]

    @property
    def worker_s(self) -> float:
        """Seconds times workers; until its first group starts, those of that group count."""
        starts = [e for e in self.events if e.event == "start"]
        if not starts:
            return 0.0
        times = [self.began_s, *(e.unix_s for e in starts[1:]), self.ended_s]
        return sum(
            (until - since) * int(e.what.get("workers", 1))
            for e, since, until in zip(starts, times, times[1:], strict=False)
        )


@dataclass(frozen=True)
class RunHistory:
    """All of it. productive_s: of the steps that count."""

    sessions: tuple[DriverSession, ...]
    productive_s: float

    @property
    def running_s(self) -> float:
        """Seconds that a driver was there, from its data being ready to its end."""
        return sum(s.ended_s - s.began_s for s in self.sessions)

    @property
    def goodput(self) -> float | None:
        """Share of that time that went into steps that count."""
        return min(1.0, self.productive_s / self.running_s) if self.running_s > 0 else None

    @property
    def events(self) -> list[LoggedEvent]:
        """All events, oldest first."""
        return [event for session in self.sessions for event in session.events]

    @property
    def num_failures(self) -> int:
        """Groups of workers that were lost, and drivers that ended otherwise than they should have."""
        lost = sum(e.event == "failed" for e in self.events)
        return lost + sum(not s.how for s in self.sessions[:-1])

    def cost(self, price_per_hour: float) -> float:
        """Of all workers' time, at the price of one worker's hour."""
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
        how = str(last.what.get("how", "")) if last.event == "ended" else ""
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


def _words(event: LoggedEvent, later: Sequence[LoggedEvent]) -> str:
    what = event.what
    if event.event == "began":
        return f"a command took the run up at step {what.get('step')} on {what.get('host')}"
    if event.event == "start":
        workers = what.get("workers", 1)
        return f"{workers} worker{'s' if workers != 1 else ''} ({what.get('device')}) began at step {what.get('step')}"
    if event.event == "failed":
        return _failure(event, next((e for e in later if e.event == "start"), None))
    if event.event == "rewind":
        return f"weights and optimizer went back to those of step {what.get('to')}"
    if event.event == "alarm":
        return f"alarm at step {what.get('step')}: {what.get('text')}"
    if event.event == "ended":
        return str(what.get("how")) + (f": {what['why']}" if what.get("why") else "")
    return f"{event.event}: {what.get('why', '')}"


def _failure(event: LoggedEvent, again: LoggedEvent | None) -> str:
    """again: the start after it, if any."""
    done = event.what.get("step")
    told = f"failure{'' if done is None else f' after step {done}'}: {event.what.get('why')}"
    if again is None:
        return told
    told += f"; training went on {duration(again.unix_s - event.unix_s)} later at step {again.what.get('step')}"
    repeated = 0 if done is None else done - again.what.get("step", done)
    return f"{told}: {repeated} step{'s' if repeated != 1 else ''} done again" if repeated > 0 else told


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
