"""The command line: every command by its name, and `main`, the entry point."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ftray.cli import cluster, data, evaluate, init, inspect, publish, runs, serve, train

RUN, MODEL, DATA, CLUSTER = "Run", "Model", "Data", "Cluster"
COMMANDS: dict[str, tuple[str, Any]] = {
    "init": (RUN, init.init),
    "run": (RUN, train.run),
    "check": (RUN, inspect.check),
    "plan": (RUN, inspect.plan),
    "train": (RUN, train.train),
    "tune": (RUN, train.tune),
    "report": (RUN, inspect.report),
    "reproduce": (RUN, train.reproduce),
    "evaluate": (MODEL, evaluate.evaluate),
    "evaluate human": (MODEL, evaluate.evaluate_human),
    "evaluate judge": (MODEL, evaluate.evaluate_judge),
    "export": (MODEL, train.export),
    "publish": (MODEL, publish.publish),
    "serve": (MODEL, serve.serve),
    "submit": (CLUSTER, cluster.submit),
    "status": (CLUSTER, cluster.job_status),
    "logs": (CLUSTER, cluster.job_logs),
    "stop": (CLUSTER, cluster.job_stop),
    "doctor": (CLUSTER, cluster.doctor),
}
GROUPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "data": (
        DATA,
        "Look at a run's data: index, stats, preview, order.",
        {"index": data.index, "stats": data.stats, "preview": data.preview, "order": data.order},
    ),
    "runs": (
        RUN,
        "Manage runs: list, rm, compare, gc.",
        {"list": runs.list_, "rm": runs.rm, "compare": runs.compare, "gc": runs.gc},
    ),
    "k8s": (CLUSTER, "Kubernetes: render.", {"render": cluster.k8s_render}),
}
TWO_WORDS = ("evaluate human", "evaluate judge")
SETTINGS = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}  # `--key=value` is an override


class _Commands(TyperGroup):
    """A group whose commands may have two words, such as `evaluate human`; `evaluate ./human` is a run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if " ".join(args[:2]) in TWO_WORDS:
            args = [" ".join(args[:2]), *args[2:]]
        return super().resolve_command(ctx, args)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        print(f"ftray {version('ftray')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune, evaluate and serve language models on Ray from one YAML file."""


def make_app() -> typer.Typer:
    """The command line. Help and errors are formatted on a terminal, and plain text elsewhere."""
    markup: Any = "rich" if sys.stdout.isatty() and sys.stderr.isatty() else None
    style: dict[str, Any] = {"rich_markup_mode": markup, "no_args_is_help": True}
    app = typer.Typer(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, **style)
    app.callback()(_root)
    for name, (panel, function) in COMMANDS.items():
        app.command(name, rich_help_panel=panel, context_settings=SETTINGS)(function)
    for name, (panel, text, commands) in GROUPS.items():
        group = typer.Typer(help=text, **style)
        for sub, function in commands.items():
            group.command(sub, context_settings=SETTINGS)(function)
        app.add_typer(group, name=name, rich_help_panel=panel)
    return app


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code (see `ftray.errors`). argv: for a call from Python; default: sys.argv."""
    command = typer.main.get_command(make_app())
    try:
        command.main(args=argv, prog_name="ftray", obj=argv is None)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
