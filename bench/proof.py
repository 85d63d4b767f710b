"""Exact resume, shown by killing (promise P2): losses of each step and final weights equal the uninterrupted run's.

    python bench/proof.py                            # all kinds, 20 kills each, then the changing world sizes
    python bench/proof.py --kinds lora-2 --kills 5   # one kind
    python bench/proof.py --kinds sizes-full-3       # 1 → 2 → 4 → 1 workers

A kind is method-stage: lora or full with ZeRO 0 to 3, in fp32, dropout on, two workers, accumulation 2, several epochs.
One run is left alone; in a second one, workers are killed with SIGKILL at random steps and moments, in the first epoch
and in later ones. Compared to the last bit: the loss of every step, the digest of the rows that every step took, and the
sha256 of weights and moments at the end. `sizes-…` changes the number of workers at three resumes and compares with one
worker: rows equal, losses within 1e-5 relative over the 50 steps after each change, 1e-3 at the end. Sums over more workers
are rounded differently, by 1e-7; how fast AdamW makes that more depends on the rate of learning, so full fine-tuning has
the run file's own there (`--rate`), and LoRA the tests' 5e-3. One JSON line a kind; exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # Ray's workers too

from ftray import storage  # noqa: E402
from ftray.errors import Interrupted  # noqa: E402
from tests import cluster, tiny  # noqa: E402

KINDS = [f"{method}-{stage}" for method in ("lora", "full") for stage in range(4)]
SIZES = [f"sizes-{kind}" for kind in ("lora-0", "lora-1", "lora-2", "lora-3", "full-1", "full-3")]


class Killer(cluster.Watched):
    """The console's stream: kills workers, one or all, at random steps spread over the whole run, and some while they load.

    One strike in each life of a group, a random moment after its step was told.
    """

    def __init__(self, kills: int, num_steps: int, seed: int) -> None:
        super().__init__()
        self._random, self._armed = random.Random(seed), False
        each = num_steps / kills
        self._steps = [int(each * (number + self._random.uniform(0, 0.7))) for number in range(kills)]
        self.killed: list[int] = []
        self._step = 0

    def write(self, text: str) -> int:
        if "workers are up" in text:
            self._armed = bool(self._steps)
            if self._armed and self._random.random() < 0.1:
                self._strike(3.0)
        for part in text.split("train: step ")[1:]:
            self._step = int(part.partition("/")[0])
            if self._armed and self._step >= self._steps[0]:
                self._strike(0.3)
        return super().write(text)

    def _strike(self, within_s: float) -> None:
        self._armed = False
        self._steps.pop(0)
        threading.Timer(self._random.uniform(0, within_s), self._kill).start()

    def _kill(self) -> None:
        found = cluster.processes_of("RayTrainWorker")
        for worker in found if self._random.random() < 0.2 else self._random.sample(found, min(1, len(found))):
            worker.kill()
        self.killed.append(self._step)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_bytes(f"{run_dir}/metrics.jsonl").splitlines()]


def train(run: Any, stream: cluster.Watched) -> Any:
    from ftray import console
    from ftray.driver.launch import train as launch
    from ftray.driver.run_record import open_run

    console.PLAIN_EVERY_S = 0.0
    return launch(run, open_run(run), console.Console(stream))


def settings_of(kind: str) -> dict[str, Any]:
    method, stage = kind.rsplit("-", 2)[-2:]
    return {
        "method__type": method,
        "deepspeed__zero_stage": int(stage),
        "checkpoint__every": 5,
        "scale__max_failures": 50,
    }


def prove_kills(kind: str, kills: int, steps: int, parts: dict[str, Path], seed: int) -> dict[str, Any]:
    """One kind: an uninterrupted run and a killed one."""
    began_s = time.monotonic()
    places = {name: parts["root"] / kind / name for name in ("smooth", "rough")}
    settings = {**settings_of(kind), "train__max_steps": steps}
    runs = {n: cluster.make_run(p, parts["model"], parts["data"], **settings) for n, p in places.items()}
    smooth = train(runs["smooth"], cluster.Watched())
    killer = Killer(kills, steps, seed)
    rough = train(runs["rough"], killer)
    lines = {name: metrics(place / "tiny") for name, place in places.items()}
    told = {n: [(x["step"], x["loss"], x["sequences"]) for x in each] for n, each in lines.items()}
    wrong = [a for a, b in zip(told["smooth"], told["rough"], strict=False) if a != b]
    hashes = {"smooth": cluster.weights_hash(smooth), "rough": cluster.weights_hash(rough)}
    return {
        "kind": kind,
        "equal": told["smooth"] == told["rough"] and hashes["smooth"] == hashes["rough"],
        "steps": steps,
        "killed_after_step": killer.killed,
        "restarts": killer.getvalue().count("restarting from step"),
        "weights_sha256": hashes["rough"][:16],
        "first_wrong": wrong[:1],
        "seconds": round(time.monotonic() - began_s, 1),
    }


def prove_sizes(kind: str, steps: int, rate: float, parts: dict[str, Path]) -> dict[str, Any]:
    """1 → 2 → 4 → 1 workers over `steps` steps each, against one worker throughout. rate: of learning, for full ones."""
    began_s = time.monotonic()
    settings = {**settings_of(kind), "train__max_steps": 4 * steps, "checkpoint__every": steps}
    if kind.startswith("sizes-full"):
        settings["train__learning_rate"] = rate
    one = cluster.make_run(
        parts["root"] / kind / "one", parts["model"], parts["data"], scale__num_workers=1, **settings
    )
    train(one, cluster.Watched())
    place = parts["root"] / kind / "many"
    changes = []
    for number, size in enumerate((1, 2, 4, 1)):
        run = cluster.make_run(place, parts["model"], parts["data"], scale__num_workers=size, **settings)
        until = f"train: step {(number + 1) * steps}/{4 * steps} " if number < 3 else ""
        try:
            train(run, cluster.Watched(*([(until, cluster.press_ctrl_c)] if until else [])))
        except Interrupted as err:
            changes.append(int(str(err).split("step ")[1].split()[0]))
    told = [metrics(parts["root"] / kind / n / "tiny") for n in ("one", "many")]
    apart = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(*told, strict=True)]
    after = [max(apart[change : change + 50]) for change in changes]
    same_rows = [a["sequences"] for a in told[0]] == [b["sequences"] for b in told[1]]
    return {
        "kind": kind,
        "equal": same_rows and max(after) <= 1e-5 and apart[-1] <= 1e-3,
        "same_rows": same_rows,
        "changed_at_steps": changes,
        "apart_within_50_steps": after,
        "apart_at_the_end": apart[-1],
        "seconds": round(time.monotonic() - began_s, 1),
    }


def prepare(root: Path) -> dict[str, Path]:
    """A tiny model with dropout in its attention (full training has no other), and records for about nine steps an epoch."""
    model = tiny.write_tiny_model(root / "model")
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, "attention_dropout": 0.1}))
    data = tiny.write_records(root / "data", 60)
    return {"root": root, "model": model, "data": data}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=KINDS + SIZES, choices=KINDS + SIZES)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each kind (20)")
    parser.add_argument("--steps", type=int, default=400, help="steps of a killed run (400)")
    parser.add_argument("--between", type=int, default=50, help="steps from one change of size to the next (50)")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of full sizes-… (2e-4)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    fine = True
    with tempfile.TemporaryDirectory(prefix="ftray-proof-") as folder, cluster.local_ray(num_cpus=6):
        parts = prepare(Path(folder))
        for kind in given.kinds:
            if kind.startswith("sizes-"):
                found = prove_sizes(kind, given.between, given.rate, parts)
            else:
                found = prove_kills(kind, given.kills, given.steps, parts, given.seed)
            fine = fine and found["equal"]
            print(json.dumps(found), flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
