"""The lease: who owns a run. A numbered file whose owner rewrites it; the highest number is the owner.

Knows files, processes and clocks, independent of what a run does.
"""

import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Self

from ftray.errors import RunHeldError, StorageError
from ftray.storage import documents, files, local, s3
from ftray.storage.address import MissingFile, absolute, is_remote, join

_NUM_LEASE_FILES = 3
DAMAGED_TTL_S = 60.0  # an owner rewrites its file every few seconds, so that one damaged for longer has none


Token = tuple[str, int]  # a run's URI and the number of the lease by which it is held


def holds(token: Token) -> bool:
    """Whether this lease still owns the run. Raises StorageError."""
    run_uri, number = token
    return max(_lease_numbers(join(absolute(run_uri), "lease")), default=0) == number


class Lease:
    """The right to write a run, kept by a thread that rewrites its file every ttl/6; made by `acquire_lease`.

    Leaving the `with` block releases it. If the process dies, its lease expires.
    """

    def __init__(
        self, folder: str, number: int, record: dict[str, Any], began_s: float, warn: Callable[[str], None]
    ) -> None:
        self._folder, self._number, self._record = folder, number, record
        self._ttl_s: float = record["ttl_s"]
        self._last_sign_s, self._warn, self._has_warned = began_s, warn, False
        self._overtaken = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ftray-lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> Token:
        """What other processes of the owner, its workers, need for `holds`."""
        return self._folder.removesuffix("/lease"), self._number

    @property
    def overtaken(self) -> bool:
        """True if another process is known to have taken the run."""
        return self._overtaken

    @property
    def lost(self) -> bool:
        """True if another process took the run, or may have: no sign of life reached the store for `ttl_s`."""
        return self._overtaken or time.monotonic() - self._last_sign_s > self._ttl_s

    def release(self) -> None:
        """Lets another process take over immediately. If the store can't be reached, it has to wait for `ttl_s`."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(self._ttl_s)
        self._record["released"] = True
        self._sign()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._overtaken and not self._stop.wait(self._ttl_s / 6):
            self._sign()

    def _sign(self) -> None:
        before = s3.retry_s.set(self._ttl_s / 3)
        began_s = time.monotonic()  # before the write: another reads the age of the write itself
        try:
            self._overtaken = max(_lease_numbers(self._folder), default=0) != self._number
            if not self._overtaken:
                files.write_bytes(_lease_uri(self._folder, self._number), json.dumps(self._record).encode())
                self._last_sign_s, self._has_warned = began_s, False
        except StorageError as error:
            if not self._has_warned:  # once for each time that the store goes away
                self._warn(
                    f"cannot renew the run's lease: {error}. Retrying; if renewal keeps failing for {self._ttl_s:.0f} s, "
                    "another command may take over the run"
                )
            self._has_warned = True
        finally:
            s3.retry_s.reset(before)


def acquire_lease(
    run_uri: str,
    ttl_s: float = 60.0,
    owner: dict[str, Any] | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Lease:
    """Takes the run, also from an owner that released it, died on this machine, or gave no sign of life for its ttl_s.

    `owner`: more about this process, kept in the lease. warn: told when it can't be renewed.

    Raises RunHeldError naming the live owner, StorageError.
    """
    folder = join(absolute(run_uri), "lease")
    for _ in range(10):
        last = max(_lease_numbers(folder), default=0)
        if last and (held := _live_owner(_lease_uri(folder, last))):
            raise RunHeldError(f"run '{run_uri.rstrip('/').rpartition('/')[2]}' {held}")
        record, began_s = {**(owner or {}), **_this_process(), **_command(), "ttl_s": ttl_s}, time.monotonic()
        mine = _lease_uri(folder, last + 1)
        if not files.create_bytes(mine, json.dumps(record).encode()):
            continue  # another was quicker: it is the owner now
        numbers = _lease_numbers(folder)
        if max(numbers) == last + 1:
            for number in numbers[:-_NUM_LEASE_FILES]:
                files.delete(_lease_uri(folder, number))
            return Lease(folder, last + 1, record, began_s, warn)
        files.delete(mine)  # this process slept so long that later owners had come, and cleared the number it took
    raise RunHeldError(f"{run_uri} changes hands too fast to be taken; try again")


def live_owner(run_uri: str) -> str:
    """Who holds a run now, in words; "" if nobody does. Raises StorageError."""
    folder = join(absolute(run_uri), "lease")
    last = max(_lease_numbers(folder), default=0)
    return _live_owner(_lease_uri(folder, last)) if last else ""


def _lease_uri(folder: str, number: int) -> str:
    return join(folder, f"{number:06d}.json")


def _lease_numbers(folder: str) -> list[int]:
    stems = [info.path.removesuffix(".json") for info in files.list_files(folder, ".json")]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _live_owner(uri: str) -> str:
    """Who holds a lease file and the remedy, in words; "" if nobody does: released, grown stale, or its process is dead."""
    try:
        data, age_s = _read_with_age(uri)
    except MissingFile:
        return ""
    try:
        record = _parse_record(data)
    except ValueError as error:
        if age_s > DAMAGED_TTL_S:
            return ""
        left_s = DAMAGED_TTL_S - age_s
        return (
            f"may be in use: its lease file {uri} is damaged ({error}). A live owner rewrites it within {left_s:.0f} s; wait "
            "that long and try again"
        )
    here = _this_process()
    dead = record["machine"] == here["machine"] and _process_start(record["pid"]) != record["process_start"]
    if record["released"] or age_s > record["ttl_s"] or (dead and here["machine"]):
        return ""
    since = datetime.fromisoformat(record["since"])
    return (
        f"is held by {record['user']} on {record['host']} (pid {record.get('command_pid', record['pid'])}, "
        f"since {since:%Y-%m-%d %H:%M} UTC, "
        f"last sign of life {age_s:.0f} s ago); wait for it, or stop it there"
    )


def _parse_record(data: bytes) -> dict[str, Any]:
    """What an owner wrote. Raises ValueError where it is not whole."""
    record = documents.parse_object(data)
    texts = ("machine", "process_start", "user", "host", "since")
    whole = all(isinstance(record.get(name), str) for name in texts) and isinstance(record.get("pid"), int)
    whole = whole and isinstance(record.get("released"), bool) and isinstance(record.get("ttl_s"), int | float)
    if not whole:
        raise ValueError("required fields are missing")
    datetime.fromisoformat(record["since"])
    return record


def _read_with_age(uri: str) -> tuple[bytes, float]:
    """Content, and its age by the store's clock, because two machines' clocks may differ."""
    if is_remote(uri):
        response = s3.request("get_object", uri)
        now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
        return response["Body"], max(0.0, (now - response["LastModified"]).total_seconds())
    with local.guarded(uri, "read") as path:
        data, written_s = path.read_bytes(), path.stat().st_mtime
    with local.guarded(uri, "written") as path, local.staged(path) as probe:
        probe.touch()
        return data, max(0.0, probe.stat().st_mtime - written_s)


def _this_process() -> dict[str, Any]:
    host, machine = socket.gethostname(), ""
    # Containers of one host share its name and boot, but a pid means a process only within its own namespace.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{host} {boot} {Path('/proc/self/ns/pid').readlink()}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid {os.getuid()}"
    since = datetime.now(UTC).isoformat(timespec="seconds")
    process = {"pid": os.getpid(), "process_start": _process_start(os.getpid()), "machine": machine}
    return {"host": host, "user": user, "since": since, "released": False, **process}


def _command() -> dict[str, int]:
    """The process that the user sees, where this one is its child."""
    parent = os.environ.get("FTRAY_COMMAND_PID", "")
    return {"command_pid": int(parent)} if parent == str(os.getppid()) else {}


def _process_start(pid: int) -> str:
    """When a process began, in clock ticks since boot; "" if it is dead.

    Pids are reused; (pid, start time) pairs are not.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
