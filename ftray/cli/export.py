"""The verb `export`: the adapter and the merged model, then, where asked for, fewer bits or GGUF, and the way to the hub.

Whatever can be wrong with what was typed is said before a model is loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from ftray import config
from ftray.cli.context import open_target, owned
from ftray.console import Console
from ftray.errors import ConfigError, RunError


def export(arguments: argparse.Namespace, console: Console) -> int:
    """Writes the model in the form asked for, and uploads it where asked to."""
    from ftray import storage
    from ftray.model.gguf import find_converter
    from ftray.model.hub_upload import check_push
    from ftray.model.quantize import check_quantize
    from ftray.train.checkpoint.catalog import best_checkpoint

    if arguments.merged and not arguments.push:
        raise ConfigError("--merged says what --push uploads; add --push hub:org/name, or leave it out")
    if arguments.converter and arguments.to != "gguf":
        raise ConfigError("--converter is for --to gguf; add that, or leave it out")
    run = open_target(arguments.run, arguments.overrides)
    step: int | None = arguments.step
    best_checkpoint(storage.absolute(run.directory), step)  # before anything is loaded
    kind = arguments.quantize
    converter = find_converter(arguments.converter) if arguments.to == "gguf" else None
    if run.method.type == "prompt-tuning" and (kind or converter or arguments.merged):
        raise ConfigError("method.type prompt trains virtual tokens, which can't be merged; export them as they are")
    if kind:
        check_quantize(kind)
    name = check_push(arguments.push) if arguments.push else None
    with owned(run, console, with_ray=kind is not None) as (run_dir, _):
        from ftray.report.model_card import described
        from ftray.train.export import export as write

        describe = partial(described, run, run_dir)
        whole = where = write(run, run_dir, console, describe, step)
        sent = whole if arguments.merged else storage.join(run_dir, "model")
        if kind:
            from ftray.evaluate.quantized import export_quantized

            where = sent = export_quantized(run, run_dir, kind, console, describe, step)
        if converter is not None:
            where = sent = _export_gguf(run, run_dir, whole, converter, console, step)
        if name is not None:
            where = f"{where}\npushed: {_push(sent, name, run, console)}"
    is_served = run.method.type != "prompt-tuning" and not (kind or converter)
    further = f"\nnext: ftray serve {arguments.run}" if is_served else ""
    console.say(f"done: {where}{further}" + (" (an adapter for PEFT)" if run.method.type == "prompt-tuning" else ""))
    return 0


def _export_gguf(
    run: config.RunConfig, run_dir: str, whole: str, converter: Path, console: Console, step: int | None
) -> str:
    """Writes `<run>/gguf/<name>.gguf` with the model's card, unless it holds this checkpoint; returns the directory's URI."""
    from ftray import storage
    from ftray.model.gguf import convert
    from ftray.report.model_card import CARD, LINEAGE
    from ftray.train.checkpoint.catalog import best_checkpoint
    from ftray.train.export import fetch_part

    found = best_checkpoint(run_dir, step)
    target = storage.join(run_dir, "gguf")
    known = None if storage.verify_directory(target) else storage.read_manifest(target)
    if known is not None and known["meta"].get("step") == found.step:
        console.say(f"step {found.step} as GGUF is there already: {target}")
        return target
    console.say(f"gguf: {converter} converts step {found.step}")
    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        source, made = fetch_part(whole, Path(scratch)), Path(scratch, "gguf")
        made.mkdir()
        file = made / f"{run.name}.gguf"
        num_tensors = convert(converter, source, file, run.train.precision)
        for name in (CARD, LINEAGE):
            if (source / name).exists():
                (made / name).write_bytes((source / name).read_bytes())
        console.say(f"gguf: {num_tensors} tensors, {file.stat().st_size / 1e6:,.1f} MB, read back")
        storage.delete_tree(target)
        meta = {"step": found.step, "run": run.name, "base": run.model.base, **found.meta}
        if not storage.commit_directory(made, target, meta):
            raise RunError(f"{target} was written by another process; run the command again")
    return target


def _push(uri: str, name: str, run: config.RunConfig, console: Console) -> str:
    """Uploads a directory, its card as the repository's README.md; returns the commit's address."""
    from ftray.model.hub_upload import push
    from ftray.report.model_card import CARD
    from ftray.train.export import fetch_part

    console.say(f"push: {uri} to {name}")
    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        directory = fetch_part(uri, Path(scratch), alone=True)
        if (directory / CARD).exists():
            (directory / CARD).rename(directory / "README.md")
        return push(directory, name, f"{run.name}, fine-tuned with ftray")
