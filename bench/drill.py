"""A fault drill: workers, nodes and the driver are killed on a random clock while one run trains.

    python bench/drill.py --minutes 20 --mean 60
    python bench/drill.py --minutes 5 --mean 45 --what worker driver

A Ray cluster of three nodes on this machine; the driver is `ftray train` as a user starts it, started again with the same
command when it was killed. A node that is killed comes back as a new one. After so many minutes SIGTERM ends the run,
and what is committed is looked at. Prints one JSON line:

goodput_no_restarts   seconds of committed steps / wall seconds, less those from each failure to the first line of the
                      new worker function
goodput               the same over all wall seconds from the first step to the last
recovery_s            from a kill to the first step after it: p50, p95
rows_lost, rows_repeated   against the order that the plan gives, replayed by `ftray data order`

Exit code 1 if a row was lost or repeated. Drills with one fault each are in drills.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray.cluster_utils import Cluster  # noqa: E402

from ftray import storage  # noqa: E402
from ftray.train.batch import sequence_hash  # noqa: E402
from ftray.train.checkpoint.catalog import list_checkpoints, merge_metrics  # noqa: E402
from tests import tiny  # noqa: E402

EACH_STEP = """import sys; from ftray import console; from ftray.cli.main import main
console.PLAIN_EVERY_S = 0.0; sys.exit(main(sys.argv[1:]))"""
SPARE_STEPS = 1_000_000


class Driver:
    """`ftray train`, started again whenever it is gone; what it says is kept with its time."""

    def __init__(self, directory: Path, address: str) -> None:
        self._directory = directory
        self._env = {**os.environ, "RAY_ADDRESS": address, "FTRAY_CACHE": str(directory / "cache")}
        self.steps: list[float] = []
        self.starts: list[float] = []
        self.said: list[str] = []
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", EACH_STEP, "train", "run.yaml"],
            cwd=self._directory,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(process,), daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic()
            if re.match(r"train: step \d+/", line):
                self.steps.append(now)
            elif "workers are up" in line:
                self.starts.append(now)
            else:
                self.said.append(line.rstrip())

    def kill(self) -> None:
        """What happens to the driver's machine process: gone, and the same command is typed again."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()


def kill_a_worker(dice: random.Random) -> bool:
    """SIGKILL to one training worker of this process's clusters; False if none is up."""
    mine = psutil.Process().children(recursive=True)
    found = [p for p in mine if "RayTrainWorker" in " ".join(_command(p))]
    if found:
        dice.choice(found).kill()
    return bool(found)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_a_node(nodes: Cluster, dice: random.Random) -> bool:
    """Takes away a node that is not the head; a new one comes in its place."""
    nodes.remove_node(dice.choice(sorted(nodes.worker_nodes, key=lambda n: n.node_id)), allow_graceful=False)
    nodes.add_node(num_cpus=2)
    return True


def write_run(directory: Path, checkpoint_every: str) -> None:
    tiny.write_tiny_model(directory / "model")
    tiny.write_records(directory / "data", 200)
    tree = {
        "name": "drill",
        "storage": "runs",
        "model": {"base": "model"},
        "method": {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"max_seq_len": 256, "chunk_mb": 0.02, "train": [{"path": "data"}]},
        "train": {
            "max_steps": SPARE_STEPS,
            "global_batch_size": 8,
            "learning_rate": 1e-4,
            "schedule": "constant",
            "precision": "fp32",
            "hang_timeout_s": 60,
        },
        "deepspeed": {"zero_stage": 2},
        "scale": {"num_workers": 2, "wait_s": 300},
        "checkpoint": {"every": int(checkpoint_every) if checkpoint_every.isdecimal() else checkpoint_every},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))


def rows_told(directory: Path, env: dict[str, str], num_steps: int) -> dict[int, str]:
    """The digest of the rows of each step, from the plan's own order."""
    command = [sys.executable, "-m", "ftray.cli.main", "data", "order", "run.yaml", "--json", "--workers", "1"]
    done = subprocess.run(
        [*command, "--steps", f"0:{num_steps}"], cwd=directory, env=env, capture_output=True, text=True, check=True
    )
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    return {e["step"]: f"{int(sequence_hash([tuple(row[:4]) for row in e['rows']])):x}" for e in entries}


def share(driver: Driver, kills: list[tuple[float, str]], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Goodput and recovery times out of what was seen."""
    begin_s, end_s = driver.steps[0], driver.steps[-1]
    # A step's own seconds, its wait for data among them, as its line in metrics.jsonl tells.
    productive_s = sum(line["num_tokens"] / line["tokens_per_s"] for line in lines)
    restarting_s, recoveries = 0.0, []
    for number, (when, _) in enumerate(kills):
        until = kills[number + 1][0] if number + 1 < len(kills) else end_s
        start = next((s for s in driver.starts if s > when), until)
        restarting_s += min(start, until) - when
        if (step := next((s for s in driver.steps if s > max(when, start)), None)) is not None:
            recoveries.append(step - when)
    recoveries.sort()
    wall_s = end_s - begin_s
    return {
        "wall_s": round(wall_s, 1),
        "goodput_no_restarts": round(productive_s / (wall_s - restarting_s), 4),
        "goodput": round(productive_s / wall_s, 4),
        "recovery_s": {
            "p50": round(recoveries[len(recoveries) // 2], 1),
            "p95": round(recoveries[min(len(recoveries) - 1, int(0.95 * len(recoveries)))], 1),
        }
        if recoveries
        else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--mean", type=float, default=60, help="seconds between failures, on average (60)")
    parser.add_argument("--what", nargs="+", choices=["worker", "node", "driver"], default=["worker", "node", "driver"])
    parser.add_argument("--checkpoint-every", default="2 s", help="as checkpoint.every (2 s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="ftray-drill-") as folder:
        directory = Path(folder)
        write_run(directory, given.checkpoint_every)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        for _ in range(2):
            nodes.add_node(num_cpus=2)
        driver = Driver(directory, nodes.address)
        try:
            while not driver.steps:
                if driver.process.poll() is not None:
                    raise SystemExit("\n".join(driver.said))
                time.sleep(0.1)
            end_s, kills = time.monotonic() + 60 * given.minutes, []
            while (left_s := end_s - time.monotonic()) > 0:
                time.sleep(min(left_s, dice.expovariate(1 / given.mean)))
                kind = dice.choice(given.what)
                if time.monotonic() >= end_s:
                    break
                now = time.monotonic()
                if kind == "driver":
                    driver.kill()
                done = kind == "driver" or (kill_a_worker(dice) if kind == "worker" else kill_a_node(nodes, dice))
                if done:
                    kills.append((now, kind))
                if driver.process.poll() is not None:  # it had joined the cluster at the node that went, or gave up
                    driver.said.append(
                        f"warning: the driver ended with {driver.process.returncode}: {driver.said[-1:]}"
                    )
                    driver.kill()
            last = len(driver.steps)
            wait_until = time.monotonic() + 120
            while (
                len(driver.steps) == last and time.monotonic() < wait_until
            ):  # the last failure, too, is recovered from
                time.sleep(0.1)
            driver.process.send_signal(signal.SIGTERM)
            code = driver.process.wait(120)
            newest = list_checkpoints(str(directory / "runs/drill"))[0]
            num_steps = merge_metrics(str(directory / "runs/drill"), newest.progress)
            text = storage.read_bytes(str(directory / "runs/drill/metrics.jsonl")).decode()
            lines = [json.loads(line) for line in text.splitlines()]
            expected = rows_told(directory, driver._env, newest.step)
        finally:
            driver.process.kill()
            nodes.shutdown()
        told = [(line["step"], line["sequences"]) for line in lines]
        found = {
            "minutes": given.minutes,
            "failures": {kind: sum(1 for _, k in kills if k == kind) for kind in given.what},
            "exit_code_after_sigterm": code,
            "steps": num_steps,
            **share(driver, kills, lines),
            "rows_lost": sum(1 for step, rows in expected.items() if (step, rows) not in set(told)) * 8,
            "rows_repeated": (len(told) - len(set(told))) * 8,
            "warnings": sorted(
                {re.sub(r"step \d+", "step …", x)[:160] for x in driver.said if x.startswith("warning:")}
            ),
        }
        print(json.dumps(found), flush=True)
        return 1 if found["rows_lost"] or found["rows_repeated"] else 0


if __name__ == "__main__":
    sys.exit(main())
