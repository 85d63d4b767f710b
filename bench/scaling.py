"""From one GPU to several: tokens/s of each GPU through `ftray train`, and its share of one GPU's.

    python -m bench.scaling --shape 8b --method lora --workers 1 2 --micro 4 --accumulate 4

Arguments that it doesn't know go to `bench.train_throughput`. Each GPU has the same rows a step in every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any


def measure(workers: int, arguments: list[str]) -> dict[str, Any]:
    """One run of `bench.train_throughput`; its line."""
    command = [sys.executable, "-m", "bench.train_throughput", "--workers", str(workers), *arguments]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def main() -> None:
    """Runs each number of workers and prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)  # `--work` is not ours
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given, arguments = parser.parse_known_args()
    speeds = {}
    for workers in given.workers:
        result = measure(workers, arguments)
        print(json.dumps(result), flush=True)
        speeds[workers] = result.get("tokens_per_s_per_gpu")
    first = speeds[given.workers[0]]
    shares = {str(n): round(speed / first, 3) for n, speed in speeds.items() if speed and first}
    print(json.dumps({"share_of_one": shares}), flush=True)


if __name__ == "__main__":
    main()
