"""Report of a sweep: table of trials, the winner and its command, results.json, report.html and best.yaml."""

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

# (run name, sweep, winner, importance of the keys, the winner's command) → HTML. `report` is above this package.
PageRenderer = Callable[[str, SweepState, TrialRecord, tuple[float, dict[str, float]] | None, str], str]


def as_table(state: SweepState, steps: Mapping[int, int] | None = None) -> list[str]:
    """Formats the trials as a table.

    Args:
        state: The sweep.
        steps: Current step of each trial that is training, by trial number. These trials come first, then the best.
    """
    training = steps or {}
    keys = list(dict.fromkeys(key for trial in state.trials for key in trial.params))
    shown = sorted(state.trials, key=lambda t: (t.number not in training, t.best.loss if t.best else float("inf")))
    rows = [["trial", *(key.rsplit(".", 1)[-1] for key in keys), "status", "step", "eval loss", "best"]]
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
    """The command that trains a new run with the winner's settings."""
    words = [f"{key}={as_word(value)}" for key, value in winner.params.items()]
    return shlex.join(["ftray", "train", target, f"name={best_name(run)}", *words])


def best_name(run: config.RunConfig) -> str:
    """Name of the run with the winner's settings."""
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
    """Writes results.json, report.html and best.yaml. Prints the table, the importance of the keys, and the commands."""
    assert run.tune is not None  # `check_tune` asks for it
    assert winner.best is not None  # only such a trial wins
    importances, command = importance(run.tune, state.trials), command_of(run, winner, target)
    checkpoint = best_checkpoint(storage.join(tune_dir, winner.name)).uri
    settings = trial_run(run, winner.params, best_name(run), run.storage)
    # Trials use the smallest number of workers; the winner uses the run file's.
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
        "importance": None if importances is None else {"share_of_steps": importances[0], "keys": importances[1]},
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
    page = render_page(run.name, state, winner, importances, command)
    storage.write_bytes(storage.join(tune_dir, "report.html"), page.encode())
    _print(run, tune_dir, state, winner, importances, command, checkpoint, console)


def _print(
    run: config.RunConfig,
    tune_dir: str,
    state: SweepState,
    winner: TrialRecord,
    importances: tuple[float, dict[str, float]] | None,
    command: str,
    checkpoint: str,
    console: Console,
) -> None:
    done, of = sum(t.step for t in state.trials), sum(t.num_steps for t in state.trials)
    best = winner.best
    assert best is not None
    for line in ("", *as_table(state), "", f"trained {done} of {of} steps ({done / max(1, of):.0%})"):
        console.say(line)
    for trial in state.trials:
        if trial.status == "failed":
            console.say(f"{trial.name} failed: {trial.error}")
    if importances is not None:
        share_of_steps, by_key = importances
        shares = ", ".join(f"{key} {share:.0%}" for key, share in by_key.items())
        console.say(f"importance of each key at {share_of_steps:.0%} of the steps: {shares}")
    elif not has_optuna() and len(run.tune.space if run.tune else ()) > 1:
        console.say("to see the importance of each key, install Optuna: pip install 'ftray[tune]'")
    console.say(
        f"best: {winner.name}, eval loss {best.loss:.4f} at step {best.step}/{winner.num_steps}\n"
        f"  checkpoint:           {checkpoint}\n"
        f"  report:               {storage.join(tune_dir, 'report.html')}\n"
        f"  train its settings:   {command}\n"
        f"  continue from its weights: {command} --from {shlex.quote(checkpoint)}\n"
        f"  evaluate it:          ftray evaluate {shlex.quote(storage.join(tune_dir, winner.name))}"
    )
