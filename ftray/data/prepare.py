"""A run's data, ready to be fed: indexed, checked, proven on a sample, and planned.

What training and the `data` verbs have in common. Knows runs and Ray Data; the tokenizer is handed in, so that nothing
here knows models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftray import config, storage
from ftray.console import Console
from ftray.data.chunks import DatasetSpec, streams
from ftray.data.drift_baseline import write_reference
from ftray.data.index import Index, build_index, check_index
from ftray.data.loader import LoadPlan, make_plan
from ftray.data.sources import other_files
from ftray.data.verify import prove_sample
from ftray.errors import ConfigError, DataError, StorageError

SUMMARY = "summary.json"
COUNTS = ("num_records", "num_tokens", "num_supervised", "num_rows")


@dataclass(frozen=True)
class PreparedData:
    """A run's data as the index knows it. data_hash: identity of training and held-out rows."""

    plan: LoadPlan
    index: Index
    heldout_stream: DatasetSpec | None
    heldout_index: Index | None
    data_hash: str


def prepare_data(
    run: config.RunConfig, run_dir: str, console: Console, load_tokenizer: Callable[[], Any], tokenizer_hash: str
) -> PreparedData:
    """Index of training and held-out data, checked, and the plan. Needs a started Ray.

    load_tokenizer: picklable. Raises DataError, ConfigError.
    """
    directory = storage.join(run_dir, "data")
    stream, heldout = streams(run.data, load_tokenizer)
    chunk_bytes = int(run.data.chunk_mb * 1e6)
    index = _index(stream, "train", run, directory, chunk_bytes, tokenizer_hash, console)
    heldout_index = _index(heldout, "eval", run, directory, chunk_bytes, tokenizer_hash, console) if heldout else None
    _say_left_out(run.data, console)
    _keep_summary(run.data, index.mixture(stream).rows_per_epoch, index, heldout_index, directory)
    try:
        write_reference(index, directory)
    except (DataError, StorageError) as err:
        console.warn(f"figures for endpoints' drift were not kept: {err}")
    hashes = [index.data_hash, heldout_index.data_hash if heldout_index else None]
    return PreparedData(
        plan_rows(index, stream, run.train), index, heldout, heldout_index, "-".join(h for h in hashes if h)
    )


def _keep_summary(data: config.DataConfig, rows: int, index: Index, heldout: Index | None, directory: str) -> None:
    """Writes the counts that a plan of the run is made from, without Ray, tokenizer or the data."""
    counts = [
        {name: each.total(name) for name in COUNTS} | {"most_documents": each.most_documents} if each else None
        for each in (index, heldout)
    ]
    tree = {"settings": _shape_of(data), "rows_per_epoch": rows, "train": counts[0], "eval": counts[1]}
    storage.write_bytes(storage.join(directory, SUMMARY), json.dumps(tree, indent=1).encode())


def read_summary(run: config.RunConfig, run_dir: str) -> dict[str, Any] | None:
    """Counts of a run's data as they were indexed last: `rows_per_epoch`; of `train` and `eval` COUNTS and `most_documents`.

    None where the data was not indexed yet, or with other settings.
    """
    uri = storage.join(run_dir, "data", SUMMARY)
    try:
        tree = storage.find_object(uri) or {}
    except storage.DamagedFile:
        return None  # written anew when the data is indexed again
    is_whole = isinstance(tree.get("rows_per_epoch"), int) and all(
        map(_is_count, (tree.get("train"), tree.get("eval")))
    )
    return tree if is_whole and tree.get("settings") == _shape_of(run.data) else None


def _is_count(counts: object) -> bool:
    if counts is None:
        return True
    values = [*map(counts.get, COUNTS), counts.get("most_documents", 1)] if isinstance(counts, dict) else [None]
    return all(isinstance(value, int) for value in values)


def _shape_of(data: config.DataConfig) -> dict[str, Any]:
    return data.model_dump(mode="json", include={"train", "eval", "max_seq_len", "packing", "labels", "clean"})


def plan_rows(index: Index, stream: DatasetSpec, train: config.TrainConfig) -> LoadPlan:
    """Which rows the steps of a run take. Raises DataError, ConfigError for fewer rows than a step takes."""
    plan = make_plan(index, stream, train.seed, train.global_batch_size, train.epochs, train.max_steps)
    if plan.mixture.rows_per_epoch < train.global_batch_size:
        raise DataError(
            f"data.train gives {plan.mixture.rows_per_epoch} packed rows, fewer than train.global_batch_size "
            f"({train.global_batch_size}); lower it, or add data"
        )
    if plan.num_steps < 1:
        raise ConfigError(f"train.epochs ({train.epochs}) is less than one global batch; raise it")
    return plan


def _say_left_out(data: config.DataConfig, console: Console) -> None:
    for source in [*data.train, *(data.eval if isinstance(data.eval, list) else [])]:
        if names := other_files(source.path):
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            console.warn(
                f"{source.path}: {len(names)} files are empty or of a kind that isn't read ({shown}); convert those that "
                "hold records"
            )


def _index(
    stream: DatasetSpec,
    what: str,
    run: config.RunConfig,
    directory: str,
    chunk_bytes: int,
    token_hash: str,
    console: Console,
) -> Index:
    with console.progress(f"data: indexing data.{what}, chunk", 1) as bar:

        def show(done: int, total: int) -> None:
            bar._total = total
            bar.update(done)

        index = build_index(stream, chunk_bytes, directory, token_hash, show)
    check_index(index, stream, what, run.data.max_bad_records, directory)
    proven = prove_sample(stream, index, what)
    tokens, rows = index.total("num_tokens"), index.total("num_rows")
    bad = f", {len(index.bad)} bad records quarantined" if index.bad else ""
    console.say(
        f"data.{what}: {index.total('num_records')} records, {tokens} tokens ({index.total('num_supervised')} supervised), "
        f"{rows} packed rows, {100 * tokens / max(1, rows * run.data.max_seq_len):.1f}% full{bad}; {proven} read back and proven"
    )
    return index


def say_steps(plan: LoadPlan, train: config.TrainConfig, console: Console) -> None:
    """Tells what an epoch is, how many steps it gives, and what becomes of the tail."""
    size, per_epoch = plan.global_batch_size, plan.mixture.rows_per_epoch
    steps, tail = divmod(per_epoch, size)
    console.say(
        f"an epoch: {per_epoch} rows, {steps} steps of {size}"
        + (f"; its tail ({tail} of {size} rows) is carried into the next epoch's first step" if tail else "")
    )
    left = round(train.epochs * per_epoch) - plan.num_steps * size if train.max_steps is None else 0
    console.say(
        f"the run: {plan.num_steps} steps, {plan.num_steps * size / per_epoch:.2f} epochs"
        + (f"; its tail ({left} of {size} rows) fills no step and is left out" if left > 0 else "")
    )
    if plan.mixture.weights is not None:
        for source, share, rows in zip(plan.stream.sources, plan.mixture.shares, plan.mixture.num_rows, strict=True):
            passes = float(share) * per_epoch / rows
            console.say(f"  {source.path}: {float(share):.1%} of the rows, {passes:.2f} passes an epoch")
