"""`ftray evaluate human`: the sheet as a page or as CSV, and what came of it. Needs no Ray, no torch and no GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ftray import config, storage
from ftray.console import Console
from ftray.errors import ConfigError
from ftray.evaluate.human.answers import RatingStore
from ftray.evaluate.human.csv_sheet import from_csv, to_csv
from ftray.evaluate.human.results import as_text, results_of
from ftray.evaluate.human.sheet import Sheet, SheetKey, directory_of, open_sheet, read_sheet


@dataclass(frozen=True)
class HumanEvalOptions:
    """What was typed: write the sheet as CSV, read a filled one, only show results; else the page at host and port."""

    csv: str | None = None
    filled: str | None = None
    results: bool = False
    host: str = "127.0.0.1"
    port: int = 8100


def human(run: config.RunConfig, asked: HumanEvalOptions, console: Console) -> None:
    """Has people compare the answers of a run, blinded; prints and writes evaluate/human/results.json.

    Raises ConfigError (no answers to compare, another sheet, a CSV that can't be read), RunHeldError, StorageError.
    """
    run_dir = storage.absolute(run.directory)
    directory = directory_of(run_dir)
    if asked.results:
        _tell(run_dir, *_known_sheet(run_dir), console)
        return
    if asked.csv is not None:
        _write_csv(open_sheet(run_dir, run.evaluate.human)[0], storage.absolute(asked.csv), console)
        return
    with storage.acquire_lease(directory):  # two processes would overwrite each other's answers
        if asked.filled is not None:
            sheet, key = _known_sheet(run_dir)
            _read_csv(sheet, directory, asked.filled, console)
        else:
            sheet, key = open_sheet(run_dir, run.evaluate.human)
            _serve(run, sheet, key, directory, asked, console)
        _tell(run_dir, sheet, key, console)


def _known_sheet(run_dir: str) -> tuple[Sheet, SheetKey]:
    if (there := read_sheet(run_dir)) is None:
        raise ConfigError(f"{directory_of(run_dir)} has no sheet yet; run `ftray evaluate human` on it first")
    return there


def _write_csv(sheet: Sheet, uri: str, console: Console) -> None:
    data = to_csv(sheet)
    if not storage.create_bytes(uri, data, private=True) and storage.read_bytes(uri) != data:
        raise ConfigError(f"{uri} is there already, and may hold answers; give another name")
    console.say(
        f"wrote {len(sheet.samples)} samples to {uri}: fill in rater, preferred (A, B or same) and scores (1 to 5), "
        "then give it to --import"
    )


def _read_csv(sheet: Sheet, directory: str, file: str, console: Console) -> None:
    found = from_csv(storage.read_bytes(storage.absolute(file)), sheet, file)
    answers = RatingStore(directory, sheet)
    for rater, given in found.items():
        answers.save(rater, given)
        console.say(f"{len(given)} answers by {rater}")


def _serve(
    run: config.RunConfig, sheet: Sheet, key: SheetKey, directory: str, asked: HumanEvalOptions, console: Console
) -> None:
    from ftray.evaluate.human.server import build_page, serving, wait_for_signal

    app = build_page(sheet, RatingStore(directory, sheet), key.token)
    with serving(app, key.token, asked.host, asked.port) as address:
        wanted = run.evaluate.human.samples
        few = f" (of {wanted}: there are no more answers; raise evaluate.num_generations)"
        console.say(f"{len(sheet.samples)} samples{few if len(sheet.samples) < wanted else ''}, {_of_each(key)}")
        console.say(f"open {address}  (each rater with a name; Ctrl-C ends and shows the results)")
        wait_for_signal()


def _of_each(key: SheetKey) -> str:
    num_slices = len({name for name in key.slices if name})
    sides = f"the tuned model's answer is on side A in {key.tuned.count('a')}"
    return f"{sides}, {num_slices} slices" if num_slices else sides


def _tell(run_dir: str, sheet: Sheet, key: SheetKey, console: Console) -> None:
    results = results_of(sheet, key, RatingStore(directory_of(run_dir), sheet).by_rater)
    uri = storage.join(directory_of(run_dir), "results.json")
    storage.write_bytes(uri, json.dumps(asdict(results), ensure_ascii=False, indent=1).encode())
    for line in [*as_text(results), f"written to {uri}"]:
        console.say(line)
