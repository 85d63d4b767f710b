"""What is told of a sweep: the table of its trials, the winner and its command, the files beside `state.json`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from ftray import config, storage
from ftray.console import Console
from ftray.driver.run_record import versions
from ftray.train.checkpoint.catalog import best_checkpoint
from ftray.tune.search import importance
from ftray.tune.space import as_word, has_optuna, trial_run
from ftray.tune.state import SweepState, TrialRecord

# (run name, sweep, winner, importance of the keys, the winner's command) → HTML. The reports above this package have one.
PageRenderer = Callable[[str, SweepState, TrialRecord, tuple[float, dict[str, float]] | None, str], str]


def as_table(state: SweepState, steps: Mapping[int, int] | None = None) -> list[str]:
    """The trials as lines. steps: newest step of those that train just now, which come first; then the best."""
    training = steps or {}
    keys = list(dict.fromkeys(key for trial in state.trials for key in trial.params))
    shown = sorted(state.trials, key=lambda t: (t.number not in training, t.best.loss if t.best else float("inf")))
    rows = [["trial", *(key.rsplit(".", 1)[-1] for key in keys), "status", "step", "held-out loss", "best"]]
    for trial in shown:
        is_waiting = trial.status == "running" and trial.number not in training
        rows.append(
            [
                trial.name,
                *(as_word(trial.params[key]) if key in trial.params else "" for key in keys),
                "waiting" if is_waiting else trial.status,
                f"{training.get(trial.number, trial.step)}/{trial.num_steps or '?'}",
                f"{trial.reports[-1].loss:.4f}" if trial.reports else "",
                f"{trial.best.loss:.4f}" if trial.best else "",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def command_of(run: config.RunConfig, winner: TrialRecord, target: str) -> str:
    """The command that trains the winner's settings under a name of their own."""
    words = [f"{key}={as_word(value)}" for key, value in winner.params.items()]
    return shlex.join(["ftray", "train", target, f"name={best_name(run)}", *words])


def best_name(run: config.RunConfig) -> str:
    """Name of a run with the winner's settings."""
    return f"{run.name[:58]}-best"


def write_report(
    run: config.RunConfig,
    tune_dir: str,
    state: SweepState,
    winner: TrialRecord,
    target: str,
    console: Console,
    render_page: PageRenderer,
) -> None:
    """Writes results.json, report.html and best.yaml; prints the table, what mattered, and the winner's command."""
    assert run.tune is not None  # `check_tune` asks for it
    assert winner.best is not None  # only such a trial wins
    found, command = importance(run.tune, state.trials), command_of(run, winner, target)
    checkpoint = best_checkpoint(storage.join(tune_dir, winner.name)).uri
    settings = trial_run(run, winner.params, best_name(run), run.storage)
    # What the run file says of workers stands: a trial has the fewest.
    settings = settings.model_copy(update={"scale": run.scale})
    text = yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    storage.write_bytes(storage.join(tune_dir, "best.yaml"), text.encode())
    tree: dict[str, Any] = {
        "metric": run.tune.metric,
        "best": {
            "trial": winner.name,
            "params": winner.params,
            "loss": winner.best.loss,
            "step": winner.best.step,
            "checkpoint": checkpoint,
            "command": command,
        },
        "importance": None if found is None else {"share_of_steps": found[0], "keys": found[1]},
        "steps": {"done": sum(t.step for t in state.trials), "of": sum(t.num_steps for t in state.trials)},
        "trials": [
            {
                "trial": t.name,
                "status": t.status,
                "params": t.params,
                "steps": t.step,
                "num_steps": t.num_steps,
                "loss": t.best.loss if t.best else None,
                "error": t.error or None,
            }
            for t in state.trials
        ],
        "versions": versions(),
    }
    storage.write_bytes(storage.join(tune_dir, "results.json"), json.dumps(tree, indent=1).encode())
    page = render_page(run.name, state, winner, found, command)
    storage.write_bytes(storage.join(tune_dir, "report.html"), page.encode())
    _say(run, tune_dir, state, winner, found, command, checkpoint, console)


def _say(
    run: config.RunConfig,
    tune_dir: str,
    state: SweepState,
    winner: TrialRecord,
    found: tuple[float, dict[str, float]] | None,
    command: str,
    checkpoint: str,
    console: Console,
) -> None:
    done, of = sum(t.step for t in state.trials), sum(t.num_steps for t in state.trials)
    best = winner.best
    assert best is not None
    for line in ("", *as_table(state), "", f"{done} of {of} steps were trained ({done / max(1, of):.0%})"):
        console.say(line)
    for trial in state.trials:
        if trial.status == "failed":
            console.say(f"{trial.name} failed: {trial.error}")
    if found is not None:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in found[1].items())
        console.say(f"what decided the loss at {found[0]:.0%} of the steps: {shares}")
    elif not has_optuna() and len(run.tune.space if run.tune else ()) > 1:
        console.say("which keys decided the loss is told where optuna is installed: pip install 'ftray[tune]'")
    console.say(
        f"best: {winner.name}, held-out loss {best.loss:.4f} at step {best.step}/{winner.num_steps}\n"
        f"  its checkpoint:       {checkpoint}\n"
        f"  as a page:            {storage.join(tune_dir, 'report.html')}\n"
        f"  train its settings:   {command}\n"
        f"  go on from its weights: {command} --from {shlex.quote(checkpoint)}\n"
        f"  or evaluate it:       ftray evaluate {shlex.quote(storage.join(tune_dir, winner.name))}"
    )
