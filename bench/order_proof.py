"""The order of rows under everything that may not change it, through the real Ray pipeline (promise P1).

    python bench/order_proof.py --stops 50

Two sources on local disk and on S3 (seaweedfs, started here). Every case is compared, row by row and by sha256 of ids
and labels, with a replay of the rules that uses no Ray: world sizes 1, 2, 4; random stops, the world size changing each
time; slow and uneven ranks; processes that pack killed with SIGKILL; 1 and 3 CPUs; S3 instead of local disk. Prints one
JSON line a case; exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # Ray's workers too

from ftray.data.loader import LoaderConfig, LoadPlan  # noqa: E402
from ftray.data.verify import TracingRank  # noqa: E402
from tests import cluster, rows, tiny  # noqa: E402
from tests.s3 import S3Server  # noqa: E402

Steps = dict[int, list[Any]]


def report(case: str, found: Steps, expected: Steps, began_s: float, **more: Any) -> bool:
    wrong = [step for step in sorted(expected) if found.get(step) != expected[step]]
    same = not wrong and found.keys() == expected.keys()
    line = {
        "case": case,
        "equal": same,
        "steps": len(expected),
        "seconds": round(time.monotonic() - began_s, 1),
        **more,
    }
    print(json.dumps(line | ({} if same else {"first_wrong_step": wrong[:1]})), flush=True)
    return same


def fed_slowly(plan: LoadPlan, world_size: int, seed: int) -> Steps:
    """As `rows.fed_steps`, but each rank goes at a pace of its own, with pauses."""
    shards = [named["train"] for named in LoaderConfig(plan).configure(None, world_size)]
    ranks = [ray.remote(TracingRank).options(num_cpus=0).remote(shard, 0) for shard in shards]
    taken: list[list[Any]] = [[] for _ in ranks]

    def consume(rank: int) -> None:
        rng = random.Random(seed * 100 + rank)
        for _ in range(plan.num_steps):
            time.sleep(rng.choice([0, 0, 0.01, 0.4 if rank == seed % world_size else 0.05]))
            taken[rank].append(ray.get(ranks[rank].next.remote())["sequences"])

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in ranks:
        ray.kill(handle)
    return {step: [tuple(row) for part in taken for row in part[step]] for step in range(plan.num_steps)}


class Killer:
    """SIGKILL to a process of this program's Ray that is packing, again and again."""

    def __init__(self, number: int) -> None:
        self.left, self.killed = number, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while self.left and not self._ended.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "ray::MapBatches" in " ".join(process.cmdline()):
                        process.kill()
                        self.left, self.killed = self.left - 1, self.killed + 1
                        self._ended.wait(0.5)
                        break
                except psutil.Error:
                    continue


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    good: list[bool] = []
    with tempfile.TemporaryDirectory() as scratch, S3Server() as s3:
        os.environ.update(s3.env)
        root = Path(scratch)
        base = rows.save_tokenizer(root / "base")
        sources = [
            tiny.write_records(root / "a", args.records),
            tiny.write_records(root / "b", args.records * 2, seed=1, shape="alpaca"),
        ]
        for source in sources:
            for path in source.iterdir():
                s3.request("PUT", f"/data/{source.name}/{path.name}", path.read_bytes())

        def plan_of(paths: list[str], name: str, **overrides: Any) -> LoadPlan:
            settings = {"train__global_batch_size": 8, "train__max_steps": None, "train__epochs": 1.5} | overrides
            return rows.make_plan(root / name, base, [{"path": p} for p in paths], scale__num_workers=1, **settings)

        def case(name: str, plan: LoadPlan, run: Callable[[], Steps], start: int = 0, **more: Any) -> None:
            began_s = time.monotonic()
            expected = dict(list(enumerate(rows.expected_steps(plan)))[start:])
            good.append(report(name, run(), expected, began_s, **more))

        local = [str(path) for path in sources]
        with cluster.local_ray():
            plan = plan_of(local, "local")
            for world_size in (1, 2, 4):
                case(f"world size {world_size}", plan, lambda w=world_size: rows.fed_steps(plan, w))
            world_size = 1
            for _ in range(args.stops):
                world_size = rng.choice([w for w in (1, 2, 4, 8) if w != world_size])
                start = rng.randrange(1, plan.num_steps)
                more = {"world_size": world_size, "step": start}
                case("stop", plan, lambda w=world_size, at=start: rows.fed_steps(plan, w, at), start, **more)
            for seed in range(3):
                case("slow ranks", plan, lambda s=seed: fed_slowly(plan, 4, s))
            with Killer(args.kills) as killer:
                while killer.left:
                    case("killed", plan, lambda: rows.fed_steps(plan, 2))
                print(json.dumps({"case": "killed", "processes": killer.killed}), flush=True)
        for num_cpus in (1, 3):
            with cluster.local_ray(num_cpus):
                case(f"{num_cpus} CPUs", plan, lambda: rows.fed_steps(plan, 2))
        with cluster.local_ray():
            remote = plan_of([f"s3://data/{path.name}/" for path in sources], "remote")
            case("S3", plan, lambda: rows.fed_steps(remote, 2))
    print(json.dumps({"cases": len(good), "equal": sum(good)}))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
