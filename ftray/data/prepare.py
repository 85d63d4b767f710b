"""A run's data, ready for training: indexed, checked, verified on a sample, and planned.

Shared by training and the `data` commands. Knows runs and Ray Data. The tokenizer is passed in, so this module knows no models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftray import config, storage
from ftray.console import Console
from ftray.data.chunks import DatasetSpec, streams
from ftray.data.index import Index, build_index, read_record_table, write_lines
from ftray.data.loader import LoadPlan, make_plan
from ftray.data.sources import line_number, other_files
from ftray.data.verify import verify_sample
from ftray.errors import ConfigError, DataError, StorageError

SUMMARY = "summary.json"
POOR_FILL, MIN_SEQUENCES = 0.7, 16  # below this share of tokens a run wastes time; a few sequences may be poorly filled
REFERENCE = "reference.json"
DECILES = range(10, 100, 10)
COUNTS = ("num_records", "num_tokens", "num_trained_tokens", "num_sequences")


@dataclass(frozen=True)
class PreparedData:
    """A run's data as the index knows it.

    Attributes:
        plan: The order of the training sequences.
        index: The index of the training data.
        eval_stream: The eval set, if the run has one.
        eval_index: Its index.
        data_hash: Identity of the training and eval sequences.
    """

    plan: LoadPlan
    index: Index
    eval_stream: DatasetSpec | None
    eval_index: Index | None
    data_hash: str


def prepare_data(
    run: config.RunConfig, run_dir: str, console: Console, load_tokenizer: Callable[[], Any], tokenizer_hash: str
) -> PreparedData:
    """Indexes and checks the training data and the eval set, and makes the plan. Needs a started Ray.

    Args:
        run: The run.
        run_dir: The run's directory.
        console: Shows progress.
        load_tokenizer: Picklable.
        tokenizer_hash: Identity of the tokenizer.

    Raises:
        DataError: The data is missing, unreadable or unusable.
        ConfigError: The settings do not fit the data.
    """
    directory = storage.join(run_dir, "data")
    stream, eval_set = streams(run.data, load_tokenizer, run.evaluate.slices)
    chunk_bytes = int(run.data.chunk_mb * 1e6)
    index = _index(stream, "train", run, directory, chunk_bytes, tokenizer_hash, console)
    eval_index = _index(eval_set, "eval", run, directory, chunk_bytes, tokenizer_hash, console) if eval_set else None
    _warn_about_other_files(run.data, console)
    _keep_summary(run.data, index.mixture(stream).sequences_per_epoch, index, eval_index, directory)
    try:
        write_reference(index, directory)
    except (DataError, StorageError) as err:
        console.warn(f"could not write {REFERENCE}, which endpoints need for drift detection: {err}")
    hashes = [index.data_hash, eval_index.data_hash if eval_index else None]
    return PreparedData(
        plan_sequences(index, stream, run.train), index, eval_set, eval_index, "-".join(h for h in hashes if h)
    )


def _keep_summary(
    data: config.DataConfig, sequences: int, index: Index, eval_set: Index | None, directory: str
) -> None:
    """Writes the counts from which `ftray plan` works without Ray, the tokenizer or the data."""
    counts = [
        {name: each.total(name) for name in COUNTS} | {"most_documents": each.most_documents} if each else None
        for each in (index, eval_set)
    ]
    tree = {"settings": _settings_of(data), "sequences_per_epoch": sequences, "train": counts[0], "eval": counts[1]}
    storage.write_bytes(storage.join(directory, SUMMARY), json.dumps(tree, indent=1).encode())


def read_summary(run: config.RunConfig, run_dir: str) -> dict[str, Any] | None:
    """The counts of a run's data when it was last indexed: `sequences_per_epoch`, and COUNTS and `most_documents` of both parts.

    Returns:
        None if the data has not been indexed yet, or only with other settings.
    """
    uri = storage.join(run_dir, "data", SUMMARY)
    try:
        tree = storage.find_object(uri) or {}
    except storage.DamagedFile:
        return None  # indexing the data writes it again
    is_whole = isinstance(tree.get("sequences_per_epoch"), int) and all(
        map(_is_count, (tree.get("train"), tree.get("eval")))
    )
    return tree if is_whole and tree.get("settings") == _settings_of(run.data) else None


def _is_count(counts: object) -> bool:
    if counts is None:
        return True
    values = [*map(counts.get, COUNTS), counts.get("most_documents", 1)] if isinstance(counts, dict) else [None]
    return all(isinstance(value, int) for value in values)


def _settings_of(data: config.DataConfig) -> dict[str, Any]:
    """The settings that can change the counts."""
    return data.model_dump(mode="json", exclude={"max_bad_records"})


def plan_sequences(index: Index, stream: DatasetSpec, train: config.TrainConfig) -> LoadPlan:
    """Decides which packed sequences the steps of a run take.

    Raises:
        DataError: There are fewer sequences than one step takes.
        ConfigError: train.epochs is less than one step.
    """
    plan = make_plan(index, stream, train.seed, train.global_batch_size, train.epochs, train.max_steps)
    if plan.mixture.sequences_per_epoch < train.global_batch_size:
        raise DataError(
            f"data.train gives {plan.mixture.sequences_per_epoch} packed sequences, fewer than train.global_batch_size "
            f"({train.global_batch_size}); lower it, or add data"
        )
    if plan.num_steps < 1:
        raise ConfigError(f"train.epochs ({train.epochs}) is less than one global batch; raise it")
    return plan


def _warn_about_other_files(data: config.DataConfig, console: Console) -> None:
    for source in [*data.train, *(data.eval if isinstance(data.eval, list) else [])]:
        if names := other_files(source.path):
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            console.warn(
                f"{source.path}: {len(names)} files are empty or have an unsupported format ({shown}); convert those "
                "with records to a supported format"
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
    num_verified = verify_sample(stream, index, what)
    tokens, sequences = index.total("num_tokens"), index.total("num_sequences")
    bad = f", {len(index.bad)} bad records quarantined" if index.bad else ""
    bad += f", {shortened_text(index.shortened, run.data.too_long)}" if index.shortened else ""
    fill = tokens / max(1, sequences * run.data.max_seq_len)
    console.say(
        f"data.{what}: {index.total('num_records')} records, {tokens} tokens ({index.total('num_trained_tokens')} trained), "
        f"{sequences} packed sequences, {fill:.1%} full{bad}; {num_verified} examples verified"
    )
    if what == "train" and (warning := fill_warning(fill, sequences, run.data)) is not None:
        console.warn(warning)
    return index


def shortened_text(shortened: dict[str, int], policy: str) -> str:
    """What `data.too_long` did to records, in words."""
    if policy == "truncate":
        return f"{shortened['records']} records truncated ({shortened['lost']} trained tokens lost)"
    lost = shortened.get("lost", 0)
    return f"{shortened['records']} records split into {shortened['examples']} examples ({lost} trained tokens lost)"


def fill_warning(fill: float, num_sequences: int, data: config.DataConfig) -> str | None:
    """A sentence about packed sequences that are mostly padding, with a remedy, or None.

    Args:
        fill: Share of the sequences' tokens that are not padding.
        num_sequences: The number of packed sequences.
        data: The section of the run file.
    """
    if fill >= POOR_FILL or num_sequences < MIN_SEQUENCES:
        return None
    remedy = "lower data.max_seq_len, raise data.chunk_mb, or join small compressed files"
    return (
        f"the packed sequences are only {fill:.1%} full, so most of the work is padding; "
        f"{remedy if data.packing else 'set data.packing: true'}"
    )


def check_index(index: Index, stream: DatasetSpec, what: str, max_bad_records: int, directory: str) -> None:
    """Writes the quarantine file and checks the counts.

    Args:
        index: The index.
        stream: The training or eval set.
        what: `train` or `eval`, for messages and the quarantine file's name.
        max_bad_records: The limit of bad records. Records that `data.clean` removed are in the quarantine file, but do not
            count.
        directory: The run's `data/`.

    Raises:
        DataError: There are too many bad records, a column is misspelled, or a source has no sequences.
    """
    uri = storage.join(directory, "quarantine", f"{what}.jsonl")
    if index.bad or index.dropped:
        write_lines(uri, [*index.bad, *index.dropped])
    is_free = stream.data is not None and stream.data.too_long == "quarantine"
    bad = [entry for entry in index.bad if not (is_free and entry.rule == "too_long")]
    if len(bad) > max_bad_records:
        first = bad[0]
        line = line_number(first.uri, first.position)
        place = f"line {line}" if line else f"record {first.position}"
        rules = ", ".join(f"{n} {rule}" for rule, n in Counter(b.rule for b in bad).most_common())
        number = "1 bad record" if len(bad) == 1 else f"{len(bad)} bad records"
        raise DataError(
            f"data.{what}: {number} ({rules}). The limit data.max_bad_records is {max_bad_records}. The first is {first.uri}, "
            f"{place}: {first.detail}. {uri} lists all of them. Correct them, or raise the limit"
        )
    if index.missing_columns:
        raise DataError(f"data.{what}: {index.missing_columns[0]}")
    for i, source in enumerate(stream.sources):
        if index.of_source(i):
            continue
        if stream.part == "eval":
            raise DataError(
                f"data.eval.fraction ({stream.eval_fraction}) selects no record of {source.path} for the eval "
                f"set ({index.total('num_records')} records in all); raise it, or give data.eval its own sources"
            )
        if index.dropped:
            raise DataError(
                f"data.{what}: data.clean removes every record of {source.path} (see {uri}); set its rules to report"
            )
        raise DataError(f"data.{what}: {source.path} has no usable record; add records or remove the source")


def say_steps(plan: LoadPlan, train: config.TrainConfig, console: Console) -> None:
    """Prints the length of an epoch and of the run in steps, and what happens to the tail."""
    size, per_epoch = plan.global_batch_size, plan.mixture.sequences_per_epoch
    steps, tail = divmod(per_epoch, size)
    console.say(
        f"an epoch: {per_epoch} sequences, {steps} steps of {size}"
        + (f"; its tail ({tail} of {size} sequences) is carried into the next epoch's first step" if tail else "")
    )
    left = round(train.epochs * per_epoch) - plan.num_steps * size if train.max_steps is None else 0
    console.say(
        f"the run: {plan.num_steps} steps, {plan.num_steps * size / per_epoch:.2f} epochs"
        + (f"; its tail ({left} of {size} sequences) fills no step and is left out" if left > 0 else "")
    )
    if plan.mixture.weights is not None:
        for source, share, sequences in zip(
            plan.stream.sources, plan.mixture.shares, plan.mixture.num_sequences, strict=True
        ):
            passes = float(share) * per_epoch / sequences
            console.say(f"  {source.path}: {float(share):.1%} of the sequences, {passes:.2f} passes an epoch")


def write_reference(index: Index, directory: str) -> None:
    """Writes the statistics of the training data with which an endpoint compares its requests (`serve/drift.py`).

    They come from the index's record tables: `prompt_tokens`, the nine deciles of the prompts' lengths in tokens, and `scripts`,
    each script's share of the letters. The prompt of a record is the part that is not trained on. An existing file for this index
    is kept.
    """
    uri = storage.join(directory, REFERENCE)
    if storage.exists(uri) and _hash_in(storage.read_bytes(uri)) == index.data_hash:
        return
    records = read_record_table(index, directory)
    lengths = records.column("num_tokens") - records.column("num_trained_tokens")
    scripts = sum((Counter(summary.scripts) for summary in records.summaries), Counter[str]())
    letters = max(1, scripts.total())
    reference = {
        "data_hash": index.data_hash,
        "prompt_tokens": [int(n) for n in np.percentile(lengths, DECILES, method="higher")] if len(lengths) else [],
        "scripts": {script: round(number / letters, 6) for script, number in scripts.most_common(20)},
    }
    storage.write_bytes(uri, json.dumps(reference).encode())


def _hash_in(text: bytes) -> object:
    try:
        return storage.parse_object(text).get("data_hash")
    except ValueError:
        return None
