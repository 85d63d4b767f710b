"""A run's directory as training leaves it, written by hand: what pages and verbs that only read storage are tried on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftray import config, storage
from ftray.evaluate.results import Comparison, ModelScores, write_results
from ftray.evaluate.stats import Difference
from ftray.train.checkpoint.catalog import RunProgress

BEGAN_S = 1_800_000_000.0
SETTINGS: dict[str, Any] = {
    "name": "seen",
    "model": {"base": "org/base"},
    "data": {"train": [{"path": "s3://ann:hunter2@bucket/data"}], "eval": {"fraction": 0.1}},
    "train": {"global_batch_size": 4, "max_steps": 40},
    "scale": {"num_workers": 2, "price_per_hour": 3.6},
    "evaluate": {"every": 10},
}


def line(step: int, loss: float, unix_s: float, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: 1,000 tokens in a second."""
    found = {"step": step, "loss": loss, "num_tokens": 1000, "num_trained_tokens": 500, "learning_rate": 1e-4 * step}
    return {**found, "grad_norm": 0.5, "tokens_per_s": 1000.0, "data_wait_s": 0.01, "unix_s": unix_s, **more}


def write_run(
    storage_dir: Path, lines: Iterable[Mapping[str, Any]], weights: object = None, **sections: Any
) -> tuple[config.RunConfig, Path]:
    """run.json, one checkpoint at the last step and its metrics. weights: anything that the checkpoint holds."""
    run = config.parse_run({**SETTINGS, "storage": str(storage_dir), **sections}, "test")
    run_dir, lines = storage_dir / run.name, list(lines)
    (run_dir / "metrics").mkdir(parents=True)
    versions = {"ftray": "0.1.0", "torch": "2.13.0"}
    identity = {"config": run.model_dump(mode="json"), "config_hash": run.config_hash, "versions": versions}
    (run_dir / "run.json").write_text(json.dumps(identity))
    segment = f"00000000-{len(lines) - 1:08d}.jsonl"
    (run_dir / "metrics" / segment).write_text("".join(json.dumps(each) + "\n" for each in lines))
    step = lines[-1]["step"] + 1
    progress = RunProgress(step=step, finished=step == run.train.max_steps, segments=[segment])
    held_out = [(each["eval_loss"], each["step"] + 1) for each in lines if "eval_loss" in each]
    progress.best = dict(zip(("loss", "step"), min(held_out), strict=True)) if held_out else None
    files = run_dir / "made"
    files.mkdir()
    (files / "state.json").write_text("{}")
    (files / "state.safetensors").write_text(json.dumps(weights))
    meta = {"progress": asdict(progress), "config_hash": run.config_hash, "data_hash": "d1-d2", "versions": versions}
    storage.commit_directory(str(files), str(run_dir / f"checkpoints/step-{step:06d}"), meta)
    shutil.rmtree(files)
    return run, run_dir


def write_session(run_dir: Path, name: str, events: Iterable[tuple[float, str, Mapping[str, Any]]]) -> None:
    """One driver's events: (seconds after BEGAN_S, event, what)."""
    file = run_dir / "events" / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"unix_s": BEGAN_S + at, "event": event, **what}) + "\n" for at, event, what in events]
    file.write_text("".join(lines))


def write_evaluation(run: config.RunConfig, run_dir: Path, num_answers: int = 4) -> None:
    """A comparison with its answers, some of them long, some of them markup."""
    base = ModelScores(500, 50, num_answers, 2.0, 7.39, 0.5, rouge_l=0.2)
    tuned = ModelScores(500, 50, num_answers, 1.0, 2.72, 0.7, rouge_l=0.4)
    sure = {
        "loss": Difference(-1.0, -1.1, -0.9, 50, -0.5, -0.55, -0.45),
        "rouge_l": Difference(0.2, 0.1, 0.3, 50, 1, 0.5, 1.5),
    }
    found = Comparison(
        40,
        run.config_hash,
        {"few_shot": 0},
        base,
        tuned,
        None,
        {"tuned - base": sure},
        ["the tuned model is better"],
        [],
    )
    write_results(found, str(run_dir))
    texts = ["<script>alert(1)</script>", "a " * 600, "x" * 300, "two\nlines"]
    answers = [
        {
            "id": n,
            "question": f"question {n} {texts[n % 4]}",
            "reference": "r",
            "base": texts[n % 4],
            "tuned": "good",
            "scores": {},
        }
        for n in range(num_answers)
    ]
    text = "".join(json.dumps(answer) + "\n" for answer in answers)
    (run_dir / "evaluate/generations.jsonl").write_text(text)


def with_two_kills(storage_dir: Path) -> tuple[config.RunConfig, Path]:
    """A run of 40 steps of a second: a worker lost after 20, its command killed after 30, an hour of nothing, the rest."""
    times = [10 + n if n < 20 else 40 + n if n < 30 else 3700 + n for n in range(40)]
    lines = [
        line(n, 3.0 * 0.95**n, BEGAN_S + at, **({"eval_loss": 3.1 * 0.95**n} if n % 10 == 9 else {}))
        | {"learning_rate": 5e-3 * 0.82**n}  # ends at 2e-6, as real ones do
        for n, at in enumerate(times)
    ]
    run, run_dir = write_run(storage_dir, lines)
    start = {"num_steps": 40, "workers": 2, "device": "NVIDIA H200"}
    write_session(
        run_dir,
        "1-a",
        [
            (0, "began", {"step": 0, "host": "n1", "pid": 1}),
            (9, "start", {"step": 0, **start}),
            (28, "alert", {"kind": "spike", "step": 18, "text": "the loss jumped and came back"}),
            (30, "failed", {"why": "worker 1 on n2 was killed (SIGKILL)", "step": 23}),
            (50, "start", {"step": 20, **start}),
        ],
    )
    write_session(
        run_dir,
        "2-b",
        [
            (3700, "began", {"step": 30, "host": "n1", "pid": 2}),
            (3729, "start", {"step": 30, **start, "workers": 1}),
            (3740, "ended", {"how": "finished", "why": ""}),
        ],
    )
    write_evaluation(run, run_dir)
    return run, run_dir
