"""Fault drills with one fault each: a small run meets it, and what is left is compared with the plan.

    python bench/drills.py                       # all of them, about fifteen minutes
    python bench/drills.py sigterm_twice kills_while_writing

Each is a function below, and prints one JSON line: what happened, and `ok`. The driver is `ftray` as a user starts it, with a
Ray of its own. Needs no GPU; `jumping_clock` needs a C compiler. Exit code 1 if a drill is not ok.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from bench.drill import rows_told, write_run  # noqa: E402
from ftray import storage  # noqa: E402
from ftray.train.checkpoint.catalog import list_checkpoints  # noqa: E402
from tests.s3 import S3Server  # noqa: E402

EACH_STEP = """import sys; from ftray import console; from ftray.cli.main import main
console.PLAIN_EVERY_S = 0.0; sys.exit(main())"""
WAIT_S = 600.0


class Command:
    """`ftray` with these words; what it says is kept."""

    running: ClassVar[list[Command]] = []

    def __init__(self, directory: Path, *words: str, **env: str) -> None:
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", EACH_STEP, *words],
            cwd=directory,
            env={**os.environ, "FTRAY_CACHE": str(directory / "cache"), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        Command.running.append(self)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())

    def wait_for(self, text: str, times: int = 1) -> None:
        """Waits until it has printed a text so often."""
        wait_until(lambda: sum(text in line for line in list(self.said)) >= times or self._is_over(), text)
        assert not self._is_over() or any(text in line for line in self.said), "\n".join(self.said[-20:])

    def _is_over(self) -> bool:
        return self.process.poll() is not None

    def end(self, within_s: float = WAIT_S) -> int:
        """Its exit code, once all of its output is read."""
        code = self.process.wait(within_s)
        self._reader.join(10)
        return code

    def processes(self, name: str) -> list[psutil.Process]:
        """Its processes whose title or command begins so; Ray's workers set theirs."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(name):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def driver(self) -> psutil.Process:
        """The process that drives Ray, a child of the command's."""
        return psutil.Process(self.process.pid).children()[0]


def wait_until(holds: Callable[[], bool], what: str, every_s: float = 0.05) -> None:
    end_s = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > end_s:
            raise AssertionError(f"waited {WAIT_S:.0f} s: {what}")
        time.sleep(every_s)


def change(directory: Path, **sections: dict[str, Any] | str) -> None:
    """Changes keys of the run file."""
    file = directory / "run.yaml"
    tree = yaml.safe_load(file.read_text())
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(tree))


def whole(directory: Path, num_steps: int, place: str = "runs/drill") -> dict[str, Any]:
    """Whether each step was trained once, on the rows of the plan, and every checkpoint is sound."""
    run_dir = place if storage.is_remote(place) else str(directory / place)
    text = storage.read_bytes(storage.join(run_dir, "metrics.jsonl")).decode()
    lines = [json.loads(line) for line in text.splitlines()]
    env = {**os.environ, "FTRAY_CACHE": str(directory / "cache")}
    expected = rows_told(directory, env, num_steps)
    same = {line["step"]: line["sequences"] for line in lines} == expected and len(lines) == num_steps
    damaged = [problem for found in list_checkpoints(run_dir) for problem in storage.verify_directory(found.uri)]
    return {"steps": len(lines), "rows_as_planned": same, "damaged": damaged, "ok": same and not damaged}


def short_run(directory: Path, num_steps: int, workers: int = 1, every: int = 5, **train: Any) -> None:
    write_run(directory, str(every))
    change(directory, train={"max_steps": num_steps, **train}, scale={"num_workers": workers})


def stopped_for_20s(directory: Path) -> dict[str, Any]:
    """A worker is stopped (SIGSTOP) for 20 s, less than train.hang_timeout_s: the run waits, and goes on."""
    short_run(directory, 60)
    command = Command(directory, "train", "run.yaml")
    command.wait_for("train: step 10/")
    (worker,) = command.processes("ray::RayTrainWorker")
    worker.suspend()
    time.sleep(20)
    worker.resume()
    code = command.end()
    anew = sum("restarting from step" in line for line in command.said)
    found = whole(directory, 60)
    return {"code": code, "started_anew": anew, **found, "ok": found["ok"] and code == 0 and anew == 0}


def stopped_for_good(directory: Path) -> dict[str, Any]:
    """A worker is stopped and never goes on: after train.hang_timeout_s it is killed and another takes its place."""
    short_run(directory, 60, hang_timeout_s=10)
    command = Command(directory, "train", "run.yaml")
    command.wait_for("train: step 10/")
    (worker,) = command.processes("ray::RayTrainWorker")
    worker.suspend()
    code = command.end()
    anew = sum("no step for" in line and "restarting from step" in line for line in command.said)
    found = whole(directory, 60)
    return {"code": code, "started_anew": anew, **found, "ok": found["ok"] and code == 0 and anew == 1}


def stopped_driver(directory: Path) -> dict[str, Any]:
    """The driver is stopped, its lease grows stale, and another command takes the run; the first then writes nothing more."""
    short_run(directory, 40, every=5)
    change(directory, train={"max_steps": 4000}, checkpoint={"every": 50})
    first = Command(directory, "train", "run.yaml")
    first.wait_for("train: step 60/")
    for process in [first.driver(), *first.driver().children(recursive=True)]:
        process.suspend()
    time.sleep(65)
    second = Command(directory, "train", "run.yaml")
    second.wait_for("train: workers continue at step")
    for process in [first.driver(), *first.driver().children(recursive=True)]:
        process.resume()
    code = first.end()
    second.wait_for("train: step")
    second.process.send_signal(signal.SIGTERM)
    again = second.end()
    steps = list_checkpoints(str(directory / "runs/drill"))[0].step
    found = whole(directory, steps)
    return {"code": code, "second": again, **found, "ok": found["ok"] and (code, again) == (2, 75)}


def kills_while_writing(directory: Path) -> dict[str, Any]:
    """Five times in one run the worker is killed while it writes a checkpoint: each time another goes on before it."""
    short_run(directory, 150, every=2)
    checkpoints, unfinished = directory / "runs/drill/checkpoints", 0
    command = Command(directory, "train", "run.yaml")
    for kill in range(5):
        command.wait_for("train: step", times=10 * (kill + 1))
        known = {each.name for each in checkpoints.glob("step-*")}

        def written(known: set[str] = known) -> list[Path]:
            new = [each for each in checkpoints.glob("step-*") if each.name not in known]
            return [each for each in new if not (each / "manifest.json").exists()]

        (worker,) = command.processes("ray::RayTrainWorker")
        wait_until(lambda: bool(written()), "a checkpoint under way", every_s=0.0005)
        under_way = written()
        worker.kill()
        unfinished += any(not (each / "manifest.json").exists() for each in under_way)
        command.wait_for("restarting from step", times=kill + 1)
        command.wait_for("train: workers continue at step", times=kill + 1)
    code = command.end()
    found = whole(directory, 150)
    ok = found["ok"] and code == 0 and unfinished > 0
    return {"code": code, "kills_before_the_manifest": unfinished, **found, "ok": ok}


def sigterm_twice(directory: Path) -> dict[str, Any]:
    """SIGTERM comes twice, as to a process and to its group: one checkpoint is committed, and the command goes on there."""
    short_run(directory, 100, every=400)
    command = Command(directory, "train", "run.yaml")
    command.wait_for("train: step 10/")
    command.process.send_signal(signal.SIGTERM)
    os.killpg(command.process.pid, signal.SIGTERM)
    code = command.end()
    (stopped,) = list_checkpoints(str(directory / "runs/drill"))
    last = Command(directory, "train", "run.yaml")
    again = last.end()
    found = whole(directory, 100)
    return {
        "code": code,
        "stopped_at": stopped.step,
        "again": again,
        **found,
        "ok": found["ok"] and (code, again) == (75, 0),
    }


def jumping_clock(directory: Path) -> dict[str, Any]:
    """The machine's clock jumps two hours ahead, then back to an hour before it began."""
    compiler = shutil.which("cc")
    if compiler is None:
        return {"skipped": "there is no C compiler (cc)", "ok": True}
    clock, offset = directory / "jump.so", directory / "offset"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", clock, ROOT / "bench/jump.c", "-ldl"], check=True)
    offset.write_bytes(struct.pack("=q", 0))

    def jump(seconds: int) -> None:
        with offset.open("r+b") as file:  # not truncated: processes have it mapped
            file.write(struct.pack("=q", seconds))

    short_run(directory, 300, every=20)
    command = Command(directory, "train", "run.yaml", LD_PRELOAD=str(clock), JUMP_OFFSET=str(offset))
    command.wait_for("train: step 20/")
    jump(2 * 3600)
    command.wait_for("train: step 60/")
    jump(-3600)
    code = command.end()
    found = whole(directory, 300)
    report = Command(directory, "report", "run.yaml").end()
    return {"code": code, "report": report, **found, "ok": found["ok"] and (code, report) == (0, 0)}


def store_gone_for_good(directory: Path) -> dict[str, Any]:
    """The S3 server ends for good: the command ends with a sentence, once it has waited as long as it was told to."""
    short_run(directory, 100_000, every=10)
    with S3Server() as server:
        os.environ.update(server.env)
        change(directory, storage=f"{server.uri}/runs")
        command = Command(directory, "train", "run.yaml", FTRAY_STORAGE_RETRY_S="2")
        command.wait_for("train: step 30/")
        before = len(list_checkpoints(f"{server.uri}/runs/drill"))
    began_s = time.monotonic()
    code = command.end()
    traces = sum("Traceback" in line for line in command.said)
    sentence = next((line for line in command.said if line.startswith("ftray: ")), "")
    return {
        "code": code,
        "checkpoints_before": before,
        "ended_after_s": round(time.monotonic() - began_s, 1),
        "sentence": sentence[:240],
        "ok": code == 1 and not traces and "can't be reached" in sentence,
    }


def changing_world(directory: Path) -> dict[str, Any]:
    """World sizes 2, 1, 3, 2 with a global batch of 12: each step has the rows of the plan, whatever trained it."""
    short_run(directory, 40, every=40, global_batch_size=12)
    codes = []
    for turn, workers in enumerate((2, 1, 3, 2)):
        command = Command(directory, "train", "run.yaml", f"scale.num_workers={workers}")
        if turn < 3:
            command.wait_for(f"train: step {10 * (turn + 1)}/")
            command.process.send_signal(signal.SIGTERM)
        codes.append(command.end())
    found = whole(directory, 40)
    return {"codes": codes, **found, "ok": found["ok"] and codes == [75, 75, 75, 0]}


def killed_sweep(directory: Path) -> dict[str, Any]:
    """A sweep loses a trial's worker, then its driver: the trial starts anew, and the same command ends the sweep."""
    short_run(directory, 60, every=5)
    change(
        directory,
        data={"eval": {"fraction": 0.1}},
        evaluate={"every": 10},
        tune={
            "search": "grid",
            "space": {"train.learning_rate": {"type": "choice", "values": [1e-3, 1e-4]}},
            "max_concurrent": 1,
            "scheduler": "none",
        },
    )
    command = Command(directory, "tune", "run.yaml")
    command.wait_for("trial-000: eval loss")
    command.processes("ray::RayTrainWorker")[0].kill()
    command.wait_for("trial-001: eval loss")
    command.driver().kill()
    code = command.end()
    again = Command(directory, "tune", "run.yaml")
    done = again.end()
    trials = json.loads((directory / "runs/drill/tune/state.json").read_text())["trials"]
    states = [trial["status"] for trial in trials]
    reports = [[report["step"] for report in trial["reports"]] for trial in trials]
    once = all(steps == sorted(set(steps)) for steps in reports)
    ok = (code, done) == (-signal.SIGKILL, 0) and states == ["done", "done"] and once
    return {"code": code, "again": done, "trials": states, "reports": reports, "ok": ok}


DRILLS = (
    *(stopped_for_20s, stopped_for_good, stopped_driver, kills_while_writing, sigterm_twice),
    *(jumping_clock, store_gone_for_good, changing_world, killed_sweep),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [drill.__name__ for drill in DRILLS]
    parser.add_argument("names", nargs="*", metavar="drill", help=", ".join(names))
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in names]:
        parser.error(f"{unknown[0]} is no drill; there are {', '.join(names)}")
    failed = 0
    for drill in DRILLS:
        if given.names and drill.__name__ not in given.names:
            continue
        with tempfile.TemporaryDirectory(prefix="ftray-drill-", ignore_cleanup_errors=True) as folder:
            began_s = time.monotonic()
            try:
                found = drill(Path(folder))
            except (AssertionError, subprocess.TimeoutExpired, ValueError) as err:
                found = {"ok": False, "failed": " ".join(str(err).split())[-400:]}
            finally:
                for command in Command.running:
                    command.process.kill()  # what it started ends with it
                    command.process.wait()
                Command.running.clear()
        failed += not found["ok"]
        print(json.dumps({"drill": drill.__name__, "seconds": round(time.monotonic() - began_s), **found}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
