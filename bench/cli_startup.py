"""CPU time of `ftray check --fast`: the limit is 0.5 s.

    python bench/cli_startup.py [--runs 10]

Runs the command in fresh processes and prints the median of user and system time, and the slowest imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = ["-m", "ftray.cli.main", "check", "--fast", "jobs/quickstart.yaml"]
LIMIT_S = 0.5


def cpu_s() -> float:
    """User and system seconds of one process of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *COMMAND], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def slowest_imports(count: int = 10) -> list[tuple[str, float]]:
    """Modules with the longest import time of their own, in ms (measured under `-X importtime`, which adds to it)."""
    command = [sys.executable, "-X", "importtime", *COMMAND]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr.splitlines()
    rows = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    times = [(row[2].strip(), int(row[0]) / 1000) for row in rows if row[0].strip().isdecimal()]
    return sorted(times, key=lambda row: -row[1])[:count]


def main() -> int:
    """Measures and prints one JSON object; returns 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    cpu_s()  # writes bytecode
    times = [cpu_s() for _ in range(arguments.runs)]
    result = {
        "command": "ftray check --fast jobs/quickstart.yaml",
        "cpu_s_median": round(statistics.median(times), 3),
        "cpu_s_min": round(min(times), 3),
        "cpu_s_max": round(max(times), 3),
        "limit_s": LIMIT_S,
        "slowest_imports_ms": dict(slowest_imports()),
    }
    print(json.dumps(result, indent=1))
    return int(result["cpu_s_median"] > LIMIT_S)


if __name__ == "__main__":
    raise SystemExit(main())
