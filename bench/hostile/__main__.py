"""Runs the hostile corpus, and prints a line for each case.

python -m bench.hostile                    all cases
python -m bench.hostile --sample 20        every n-th case, 20 of them
python -m bench.hostile --kind data --only parquet
"""

from __future__ import annotations

import argparse
import sys

from bench.hostile.case import Case, all_cases
from bench.hostile.run import run_case


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when every case kept every promise."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description="Runs the hostile corpus.")
    parser.add_argument("--sample", type=int, metavar="N", help="run N cases, spread evenly, none that starts Ray")
    parser.add_argument("--kind", action="append", default=[], help="only cases of this kind; may be given again")
    parser.add_argument("--only", default="", help="only cases whose name holds this text")
    parser.add_argument("--list", action="store_true", help="only print the names")
    given = parser.parse_args(argv)
    cases = [case for case in all_cases(given.kind) if given.only in case.full_name]
    if given.sample is not None:
        cases = sample(cases, given.sample)
    failed = 0
    for case in cases:
        if given.list:
            print(case.full_name)
            continue
        outcome = run_case(case)
        failed += bool(outcome.faults)
        verdict = "FAULT" if outcome.faults else "ok"
        print(
            f"{verdict:5} {outcome.seconds:5.1f} s {outcome.peak_bytes >> 20:5d} MiB  {outcome.name}: {outcome.answer[:160]}"
        )
        for fault in outcome.faults:
            print(f"      {fault}")
        if outcome.faults:
            print("\n".join(f"      | {line[:200]}" for line in outcome.output.splitlines()[-12:]))
        sys.stdout.flush()
    print(f"{len(cases)} cases, {failed} with faults")
    return int(failed > 0)


def sample(cases: list[Case], number: int) -> list[Case]:
    """`number` cases that start no Ray, spread evenly over all of them."""
    quick = [case for case in cases if not case.uses_ray]
    step = max(1, len(quick) // max(1, number))
    return quick[::step][:number]


if __name__ == "__main__":
    sys.exit(main())
