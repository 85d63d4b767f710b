"""Training across two hosts that share nothing but an S3 server, while the link between them is cut.

    sudo .venv/bin/python bench/two_hosts.py                       # all cases
    sudo .venv/bin/python bench/two_hosts.py --cases blip          # the undisturbed run, and one case

Linux, as root. Each host is a set of namespaces: a name, an address on a bridge (veth), processes, a /tmp with its home and
a /dev/shm of its own, in memory; the rest of the disk can't be written. /etc/hosts is as Debian writes it: a host's own name
is 127.0.1.1. h0 has Ray's head, the driver and a worker, h1 the other worker. Each host makes the model for itself; data and
results are in the bucket. The tiny model trains on two workers, LoRA in fp32 with dropout:

smooth   undisturbed: what the others are held against
blip     the link of h1 is cut for 20 s: every loss and every step's rows as undisturbed, to the last bit
fewer    h1 is cut off for good, one to two workers are allowed: the run continues with one; rows as undisturbed, losses within
         1e-5 relative over the 50 steps after the change, 1e-3 at the end
waits    h1 is cut off for good, two workers are needed: exit code 75 after scale.wait_s, what is committed as undisturbed
again    after `waits`: h1 is back, the same command continues, and losses and rows are as undisturbed, to the last bit

Prints one JSON line a case; still_s: the longest time without a step from the cut on; apart: how far a loss is at most from
the undisturbed one, relatively. Exit code 1 if a case is not as it should be. What was started is gone when the command
ends, however it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.drill import EACH_STEP  # noqa: E402
from tests.s3 import S3Server  # noqa: E402

ADDRESSES = {"h0": "10.77.0.1", "h1": "10.77.0.2", "s3": "10.77.0.3"}
GATEWAY, HOME, GCS = "10.77.0.254", "/tmp/home", f"{ADDRESSES['h0']}:6379"
CASES = ("blip", "fewer", "waits", "again")
LACKS = (
    "ftray: for 10 s, the cluster has room for 1 worker, but the run needs at least 2 (scale.num_workers). The "
    "checkpoint of step"
)
ALONE = f"""set -e; mount -t tmpfs tmp /tmp; mount -t tmpfs shm /dev/shm; mkdir {HOME}; hostname $0
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' $0 >/tmp/hosts; mount --bind /tmp/hosts /etc/hosts
mount -o remount,ro,bind /; echo up; exec sleep infinity"""
SERVE = """import sys; from tests.s3 import S3Server
with S3Server(host=sys.argv[1]) as server: print(server.endpoint, flush=True); sys.stdin.read()"""
MODEL = "from pathlib import Path; from tests import tiny; tiny.write_tiny_model(Path('model'))"
DATA = """from pathlib import Path; from ftray import storage; from tests import tiny
for shard in tiny.write_records(Path('data'), 200).iterdir(): storage.upload_file(str(shard), f's3://data/rows/{shard.name}')"""
TELL = "import sys; from ftray import storage; print(storage.read_bytes(sys.argv[1]).decode())"
ENV = {
    **{key: value for key, value in os.environ.items() if key.startswith(("GLOO_", "RAY_", "LANG"))},
    "HF_HUB_OFFLINE": "1",
    "HOME": HOME,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    "RAY_USAGE_STATS_ENABLED": "0",
}
Line = tuple[int, float, str]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def wait_for(holds: Callable[[], Any], what: str, deadline_s: float = 300.0) -> None:
    """Waits until something holds; ends the bench where it never does."""
    end_s = time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > end_s:
            raise SystemExit(f"waited {deadline_s:.0f} s for {what}")
        time.sleep(0.1)


class Host:
    """Namespaces that live as long as the first process in them; all that runs in them goes with it."""

    def __init__(self, name: str, script: str, env: dict[str, str]) -> None:
        self.name, self._env = name, env
        apart = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self._process = subprocess.Popen(
            [*apart, "sh", "-c", script, name],
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call
            **options,
        )
        if self._process.stdout.readline() != "up\n":  # type: ignore[union-attr]
            raise SystemExit(f"the namespaces of {name} can't be made; this wants Linux, root and iproute2")
        self.pid = psutil.Process(self._process.pid).children()[0].pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ip(self, words: str) -> None:
        """`ip …` in this host's network."""
        subprocess.run(["nsenter", "-t", str(self.pid), "-n", "ip", *words.split()], check=True)

    def start(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        """A process on this host, in its home."""
        inside = ["nsenter", "-t", str(self.pid), "-a", f"--wdns={HOME}", *command]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(inside, env=self._env, start_new_session=True, **{**pipes, **more})

    def python(self, *arguments: str) -> str:
        """What Python prints on this host."""
        process = self.start(sys.executable, *arguments)
        out, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"{self.name}: {arguments} ended with {process.returncode}: {err}")
        return out


class Site:
    """The hosts on their bridge, the S3 server, and Ray on both."""

    def __init__(self, stack: ExitStack) -> None:
        env, self._cut = ENV | S3Server().env, False
        self._switch = stack.enter_context(Host("switch", "echo up; exec sleep infinity", env))
        for words in ("link add br0 type bridge", f"addr add {GATEWAY}/24 dev br0", "link set br0 up"):
            self._switch.ip(words)
        hosts = {name: stack.enter_context(Host(name, ALONE, env)) for name in ADDRESSES}
        for name, host in hosts.items():
            self._switch.ip(f"link add {name} type veth peer name eth0 netns {host.pid}")
            self._switch.ip(f"link set {name} master br0 up")
            way = (f"addr add {ADDRESSES[name]}/24 dev eth0", "link set eth0 up", f"route add default via {GATEWAY}")
            for words in ("link set lo up", *way):
                host.ip(words)
        self._served = hosts["s3"].start(sys.executable, "-c", SERVE, ADDRESSES["s3"])
        env["AWS_ENDPOINT_URL_S3"] = self._served.stdout.readline().strip()  # type: ignore[union-attr]
        env["RAY_ADDRESS"] = GCS
        self.h0, self.h1 = hosts["h0"], hosts["h1"]
        self.h0.python("-c", MODEL + "\n" + DATA)
        self.h1.python("-c", MODEL)
        self._head = self._ray(self.h0, "--head", "--num-cpus=3", "--include-dashboard=false")
        self.join()

    def _ray(self, host: Host, *arguments: str) -> subprocess.Popen[str]:
        command = ["ray", "start", "--block", "--object-store-memory=200000000", *arguments]
        return host.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def join(self) -> None:
        """Starts Ray on h1, and waits until both hosts are seen."""
        self._node = self._ray(self.h1, f"--address={GCS}", "--num-cpus=2")
        doctor = ("-m", "ftray.cli.main", "doctor")
        wait_for(lambda: "2 answer" in self.h0.start(sys.executable, *doctor).communicate()[0], "Ray on both hosts")

    def link(self, state: str) -> None:
        """h1's cable: `down`, `up`."""
        self._cut = state == "down"
        self._switch.ip(f"link set h1 {state}")

    def come_back(self) -> None:
        """Makes h1 one of the cluster again. Ray there learns that it was given up, ends by itself, and is started anew."""
        if self._cut:
            self.link("up")
            wait_for(lambda: self._node.poll() is not None, "the end of Ray on h1")
            self.join()


class Driver:
    """`ftray train` on h0: what it says, and when each step was told."""

    def __init__(self, site: Site, case: str, num_workers: Any, max_steps: int) -> None:
        tree = {
            "name": "tiny",
            "storage": f"s3://data/{case}",
            "model": {"base": f"{HOME}/model"},
            "method": {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"max_seq_len": 128, "chunk_mb": 0.02, "train": [{"path": "s3://data/rows"}]},
            "train": {"max_steps": max_steps, "global_batch_size": 8, "learning_rate": 5e-3, "precision": "fp32"},
            "scale": {"num_workers": num_workers, "cpus_per_worker": 1.6, "wait_s": 10},  # 1.6: one on each host
            "checkpoint": {"every": 10},
        }
        self.steps: list[tuple[float, int]] = []
        self.said: list[str] = []
        command = f"cat >{case}.yaml && exec {sys.executable} -c '{EACH_STEP}' train {case}.yaml"
        self._process = site.h0.start("sh", "-c", command, stderr=subprocess.STDOUT)
        self._process.stdin.write(json.dumps(tree))  # type: ignore[union-attr]
        self._process.stdin.close()  # type: ignore[union-attr]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]
            if found := re.match(r"train: step (\d+)/", line):
                self.steps.append((time.monotonic(), int(found[1])))
            else:
                self.said.append(line.rstrip())

    def reach(self, step: int) -> None:
        """Waits until a step is done, or the command over."""
        wait_for(lambda: self._process.poll() is not None or any(n >= step for _, n in self.steps), f"step {step}")

    def end(self) -> int:
        """The exit code."""
        wait_for(lambda: self._process.poll() is not None, f"the end of the driver, which said {self.said}")
        self._reader.join(10)
        return int(self._process.returncode)


class Trial:
    """The cases, one after the other on one site."""

    def __init__(self, site: Site, max_steps: int) -> None:
        self._site, self._max_steps = site, max_steps
        self._undisturbed: list[Line] = []

    def run(self, case: str) -> dict[str, Any]:
        """What a case was like; `fine`: as it should be."""
        self._site.come_back()
        began_s, cut_s = time.monotonic(), float("inf")
        place = "waits" if case == "again" else case
        driver = Driver(self._site, place, {"min": 1, "max": 2} if case == "fewer" else 2, self._max_steps)
        if case in ("blip", "fewer", "waits"):
            driver.reach(self._max_steps // 3)
            self._site.link("down")
            cut_s = time.monotonic()
        if case == "blip":
            time.sleep(20)
            self._site.link("up")
        code, told = driver.end(), self._lines(place)
        if case == "smooth":
            self._undisturbed = told
        about = re.compile(r"warning:|ftray:|train: (going|there|continuing)")
        return {
            "case": case,
            "fine": self._is_fine(case, code, told, driver.said),
            "exit_code": code,
            "committed": len(told),
            "cut_after_step": max((n for when, n in driver.steps if when <= cut_s), default=0),
            "still_s": round(max((b - a for a, b in pairwise(w for w, _ in driver.steps) if b > cut_s), default=0), 1),
            "apart": max(self._apart(told), default=0.0),
            "said": [line for line in driver.said if about.match(line)],
            "seconds": round(time.monotonic() - began_s, 1),
        }

    def _is_fine(self, case: str, code: int, told: list[Line], said: list[str]) -> bool:
        even = [step for step, *_ in told] == list(range(self._max_steps)) and told == self._undisturbed
        if case == "fewer":
            apart, rows = self._apart(told), [each[::2] for each in told]
            change = next((number for number, each in enumerate(apart) if each), 0)
            close = max(apart[change : change + 50], default=1) <= 1e-5 and apart[-1] <= 1e-3
            says = "train: continuing with 1 workers instead of 2" in said
            return code == 0 and says and close and rows == [each[::2] for each in self._undisturbed]
        if case == "waits":
            begun = len(told) > 0 and told == self._undisturbed[: len(told)]
            return code == 75 and begun and said[-1].startswith(LACKS)
        return code == 0 and even and (case != "again" or any(x.startswith("train: continuing at") for x in said))

    def _apart(self, told: list[Line]) -> list[float]:
        """How far each loss is from the undisturbed one, relatively."""
        return [abs(a[1] - b[1]) / abs(a[1]) for a, b in zip(self._undisturbed, told, strict=False)]

    def _lines(self, case: str) -> list[Line]:
        """(step, loss, digest of its rows) of each committed step."""
        text = self._site.h0.python("-c", TELL, f"s3://data/{case}/tiny/metrics.jsonl")
        lines = [json.loads(line) for line in text.splitlines() if line]
        return [(line["step"], line["loss"], line["sequences"]) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (300); the link is cut after a third")
    given = parser.parse_args()
    if sys.platform != "linux" or os.geteuid():
        raise SystemExit("bench/two_hosts.py makes network namespaces: it wants Linux and root")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    fine = True
    with ExitStack() as stack:
        trial = Trial(Site(stack), given.steps)
        for case in ("smooth", *given.cases):
            found = trial.run(case)
            print(json.dumps(found, ensure_ascii=False), flush=True)
            if not (fine := fine and found["fine"]) and case == "smooth":
                break
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
