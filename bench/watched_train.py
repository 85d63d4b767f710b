"""`ftray train` whose events are printed as JSON lines, for benchmarks that end a run without its last checkpoint.

python bench/watched_train.py RUN.yaml [key=value …]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MARK = "event: "


def watch(
    file: Path, overrides: list[str], num_steps: int, limit_s: float, log: Path
) -> tuple[list[dict[str, Any]], str]:
    """Runs a run file until num_steps steps are done, then ends it; returns its events, and the log's end if it failed."""
    command = [sys.executable, __file__, str(file), *overrides]
    events: list[dict[str, Any]] = []
    end_s = time.monotonic() + limit_s
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )

    def read() -> None:
        with log.open("w", buffering=1) as sink:
            for line in process.stdout or ():
                sink.write(line)
                if line.startswith(MARK):
                    events.append(json.loads(line[len(MARK) :]))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while time.monotonic() < end_s and sum(e["event"] == "step" for e in events) < num_steps and reader.is_alive():
        time.sleep(0.05)
    _end(process)
    reader.join(5)
    done = sum(e["event"] == "step" for e in events) >= num_steps
    return events, "" if done else "\n".join(log.read_text().splitlines()[-25:])


def _end(process: subprocess.Popen[str]) -> None:
    """Two Ctrl-C end a run at once; Ray's own processes go with it."""
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _wait_for_memory()


def _wait_for_memory() -> None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    for _ in range(60):
        try:
            found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            return
        if all(int(v) < 1500 for v in found):
            return
        time.sleep(0.25)


def main() -> None:
    """The watched process."""
    from ftray.cli import main as cli
    from ftray.events.bus import EventBus
    from ftray.events.types import Event, to_dict

    emit = EventBus.emit
    out = os.fdopen(os.dup(1), "w", buffering=1)  # a run redirects its own output

    def watched(bus: EventBus, event: Event) -> None:
        out.write(MARK + json.dumps(to_dict(event), default=vars) + "\n")
        emit(bus, event)

    EventBus.emit = watched  # type: ignore[method-assign]
    sys.argv = ["ftray", "train", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    main()
