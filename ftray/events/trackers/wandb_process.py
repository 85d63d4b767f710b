"""The process that talks to Weights & Biases for `wandb`: it reads and writes one JSON object per line.

Output: {"last": the last step that W&B has} once the run is open, {"done": true} once all is sent, or {"error": …}.
Input: {"step", "values"} for each step, then {"state": how the command ended}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ftray.redact import redacted


def main() -> None:
    """Runs until its input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints
    try:
        _log_run(json.loads(sys.argv[1]), out)
    except Exception as err:  # noqa: BLE001 - whatever the library raises is reported
        _write(out, error=redacted(f"{type(err).__name__}: {err}"))
        out.flush()
        os._exit(1)  # the library's own exit may wait for a server


def _log_run(settings: dict[str, Any], out: Any) -> None:
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "ftray"),
        name=settings["name"],
        id=settings["id"],
        resume="allow" if settings["mode"] == "online" else None,
        dir=settings["dir"],
        mode=settings["mode"],
        config={"config_hash": settings["config_hash"]},
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
        ),
    )
    _write(out, last=int(run.starting_step) - 1)
    state = "KILLED"
    for text in sys.stdin:
        message = json.loads(text)
        if "state" in message:
            state = message["state"]
        else:
            run.log(message["values"], step=int(message["step"]), commit=True)
    run.finish(exit_code=1 if state == "FAILED" else 0)
    _write(out, done=True)


def _write(out: Any, **message: Any) -> None:
    print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    main()
