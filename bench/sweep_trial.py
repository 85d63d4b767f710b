"""A sweep that gives trials up against one that trains all of them: what it finds, and what it costs.

    python bench/sweep_trial.py                      # the tests' tiny model: minutes on two cores
    python bench/sweep_trial.py --model small        # SmolLM2-135M writing docstrings, as in the quickstart

Eight LoRA trials with learning rates drawn over three powers of ten, once with the scheduler `none`, once with `asha`: the
same eight. Prints one JSON line for each, and one with the ratios; exit code 1 unless the second finds a held-out loss
within 1% of the first's, in at most half of its steps. `--only` runs one of both; the ratios come with the second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ftray.config import TuneConfig  # noqa: E402
from ftray.tune.scheduler import TrialPruner  # noqa: E402
from ftray.tune.state import SweepState  # noqa: E402

SPACE = {"train.learning_rate": {"type": "loguniform", "low": 3e-5, "high": 3e-2}}


def settings(model: str, directory: Path, scheduler: str, steps: int) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "name": scheduler,
        "storage": str(directory),
        "method": {"type": "lora", "rank": 8, "alpha": 16},
        "scale": {"num_workers": 1},
        "checkpoint": {"every": steps, "keep": 1},
        "evaluate": {"every": steps // 10},
        "tune": {"num_trials": 8, "scheduler": scheduler, "space": SPACE},
    }
    if model == "small":
        data = {
            "train": [{"path": "embedded:stdlib-docstrings/train"}],
            "eval": [{"path": "embedded:stdlib-docstrings/eval"}],
        }
        tree |= {
            "model": {"base": "embedded:smollm2-135m-instruct"},
            "data": {"max_seq_len": 512, "chunk_mb": 0.05, **data},
        }
        tree["train"] = {"max_steps": steps, "global_batch_size": 4, "precision": "bf16", "warmup": 0.1}
        return tree
    from tests import tiny

    if not (directory / "model").exists():
        tiny.write_tiny_model(directory / "model")
        tiny.write_records(directory / "data", 200)
        tiny.write_records(directory / "heldout", 40, seed=1)
    paths = {"train": [{"path": str(directory / "data")}], "eval": [{"path": str(directory / "heldout")}]}
    tree |= {"model": {"base": str(directory / "model")}, "data": {"max_seq_len": 128, "chunk_mb": 0.004, **paths}}
    tree["train"] = {"max_steps": steps, "global_batch_size": 8, "precision": "fp32", "warmup": 0.1}
    return tree


def run_sweep(directory: Path, tree: dict[str, Any]) -> None:
    file = directory / f"{tree['name']}.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "ftray.cli.main", "tune", str(file)], check=True, stdout=sys.stderr)
    results = read(directory, tree["name"])
    print(
        json.dumps(
            {
                "scheduler": tree["name"],
                "best_loss": results["best"]["loss"],
                "learning_rate": results["best"]["params"]["train.learning_rate"],
                "steps": results["steps"]["done"],
                "of": results["steps"]["of"],
                "seconds": round(time.monotonic() - began_s, 1),
            }
        ),
        flush=True,
    )


def read(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name / "tune" / "results.json").read_text())


def replay(directory: Path, **tune: Any) -> tuple[float, float]:
    """(share of the steps, best loss over the full sweep's) that a scheduler would have taken and found on the full
    sweep's curves, two trials at once, each taking the same time a step."""
    trees = json.loads((directory / "none" / "tune" / "state.json").read_text())["trials"]
    curves = [[(r["share"], r["loss"]) for r in tree["reports"]] for tree in trees]
    judge, waiting, going = (
        TrialPruner(TuneConfig(space=SPACE, num_trials=8, **tune), SweepState({})),
        list(range(len(curves))),
        {},
    )
    taken, best = 0.0, float("inf")
    while waiting or going:
        while waiting and len(going) < 2:
            going[waiting.pop(0)] = 0
        for number, place in list(going.items()):
            share, loss = curves[number][place]
            going[number] += 1
            stop = judge.stops(number, share, loss)
            best = min(best, loss)
            if stop or place + 1 == len(curves[number]):
                taken += share
                del going[number]
    full = min(loss for curve in curves for _, loss in curve)
    return taken / len(curves), best / full


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "small"], default="tiny")
    parser.add_argument("--steps", type=int, default=40, help="steps of a trial, a multiple of ten (40)")
    parser.add_argument("--directory", type=Path, default=Path("runs/sweep-trial"))
    parser.add_argument("--only", choices=["none", "asha"])
    parser.add_argument("--replay", action="store_true", help="only replay other settings on the full sweep's curves")
    given = parser.parse_args()
    directory = given.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    if given.replay:
        for grace in (0.1, 0.2, 0.3):
            for factor in (2.0, 3.0, 4.0):
                share, over = replay(directory, grace=grace, reduction_factor=factor)
                line = {"grace": grace, "reduction_factor": factor, "steps": round(share, 3), "loss": round(over, 4)}
                print(json.dumps(line))
        share, over = replay(directory, scheduler="median")
        print(json.dumps({"scheduler": "median", "steps": round(share, 3), "loss": round(over, 4)}))
        return 0
    for scheduler in ("none", "asha"):
        if given.only in (None, scheduler):
            run_sweep(directory, settings(given.model, directory, scheduler, given.steps))
    if given.only == "none":
        return 0
    full, early = read(directory, "none"), read(directory, "asha")
    steps, loss = early["steps"]["done"] / full["steps"]["done"], early["best"]["loss"] / full["best"]["loss"]
    print(json.dumps({"steps_ratio": round(steps, 3), "loss_ratio": round(loss, 5)}))
    return int(steps > 0.5 or loss > 1.01)


if __name__ == "__main__":
    sys.exit(main())
