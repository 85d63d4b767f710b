"""Base and tuned model side by side on the held-out data: what records cost them, and what they answer to some.

Each model is scored by Ray tasks of its own, so that all run at once where there is room. Knows runs, checkpoints, the
held-out records and the tasks; nothing of metrics, serving or how a report looks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from ftray import config, storage
from ftray.console import Console
from ftray.driver.preflight import check_evaluation
from ftray.evaluate import metrics, summary
from ftray.evaluate.metrics import Statistic
from ftray.evaluate.plan import NO_ANSWERS, EvalPlan, make_plan, read_schema, turns_of
from ftray.evaluate.report import report, side_by_side
from ftray.evaluate.results import Comparison, known_results, settings_of, with_gates, write_results
from ftray.evaluate.score import ScoreResult, ScoreTask, merge, score
from ftray.model.load import absolute_base
from ftray.train.checkpoint.catalog import CheckpointRef
from ftray.train.driver_channel import DriverChannel

POLL_S = 0.5
# What files that hold other values than their writer wrote raise.
UNREADABLE = (storage.DamagedFile, storage.MissingFile, LookupError, ValueError, TypeError, AttributeError)
MIN_SHARE = 32  # examples for which it is worth loading the model once more


def compare(run: config.RunConfig, run_dir: str, console: Console, step: int | None = None) -> tuple[Comparison, str]:
    """Scores base and tuned model, writes evaluate/results.json and evaluate/generations.jsonl, prints both.

    Returns the comparison and a held-out question to try the endpoint with. Nothing is computed again while checkpoint
    and settings are the same; gates are judged again. step: of the checkpoint; the best if left out.

    Needs a started Ray. Raises ConfigError without held-out data or without a checkpoint.
    """
    found = check_evaluation(run, run_dir, step)
    directory = storage.join(run_dir, "evaluate")
    known = known_results(run, run_dir, found.step)
    if known is not None:
        try:
            shown, question = _shown(run, run_dir, known)
            console.say(f"evaluation of step {found.step} is there already: {directory}")
            write_results(known, run_dir)  # gates may be others
        except UNREADABLE as err:
            console.warn(f"files in {directory} are damaged or missing ({err}); evaluating anew")
            known = None
    if known is None:
        known = _compare(run, run_dir, found, console)
        shown, question = _shown(run, run_dir, known)
    for line in shown:
        console.say(line)
    return known, question


def _shown(run: config.RunConfig, run_dir: str, known: Comparison) -> tuple[list[str], str]:
    """The lines that tell of a comparison, and a held-out question, out of the files beside results.json."""
    directory = storage.join(run_dir, "evaluate")
    lines = storage.read_bytes(storage.join(directory, "generations.jsonl")).splitlines()
    generations = [storage.parse_object(line) for line in lines]
    speed = storage.read_object(storage.join(directory, "speed.json"))
    said = [*report(known, speed), *side_by_side(generations[: run.evaluate.num_shown])]
    return said, str(generations[0]["question"]) if generations else "Hello"


def _compare(run: config.RunConfig, run_dir: str, found: CheckpointRef, console: Console) -> Comparison:
    there = run.model_copy(update={"model": absolute_base(run.model)})
    plan = make_plan(there, run_dir)
    _say_plan(run, plan, found, console)
    scored = _score_all(there, found, plan.works, console)
    num_asked = len(plan.asked)
    schema, answers = read_schema(run.evaluate), {name: s.answers[:num_asked] for name, s in scored.items()}
    models = {
        name: summary.costs_of(s.tokens, s.general)
        | summary.answers_of(run.evaluate, answers[name], plan.references, plan.labels, schema)
        for name, s in scored.items()
    }
    comparison = _assemble(run, found, plan, scored, models, answers)
    _write(run_dir, run, plan, scored, models, comparison)
    return comparison


def _say_plan(run: config.RunConfig, plan: EvalPlan, found: CheckpointRef, console: Console) -> None:
    num_trained_tokens = sum(int(np.asarray(m)[1:].sum()) for e in plan.works["base"].examples for _, m in e)
    names = "base, few-shot base" if "few_shot" in plan.works else "base"
    console.say(
        f"evaluate: {num_trained_tokens} held-out tokens and {len(plan.asked)} answers, {names} and step {found.step}"
    )
    if not plan.asked and set(run.evaluate.metrics) - NO_ANSWERS:
        console.warn("no held-out record is a conversation that ends with an answer, so that only losses are compared")


def _score_all(
    run: config.RunConfig, found: CheckpointRef, works: Mapping[str, ScoreTask], console: Console
) -> dict[str, ScoreResult]:
    """Each model's work in as many tasks as there is room and work for."""
    monitor = ray.remote(DriverChannel).options(num_cpus=0).remote()
    resources = ray.cluster_resources()
    num_gpus = 1.0 if resources.get("GPU", 0) else 0.0
    room = resources["GPU"] if num_gpus else resources["CPU"] // run.scale.cpus_per_worker
    remote = ray.remote(score).options(num_cpus=run.scale.cpus_per_worker, num_gpus=num_gpus)
    weights = {name: work.weight(run.evaluate.max_new_tokens) for name, work in works.items()}
    pieces = max(
        int(room), 2 * len(works)
    )  # with little room more than fit at once, so that nothing waits for one of them
    tasks = {}
    for name in sorted(works, key=lambda name: -weights[name]):
        num = _num_shares(works[name], round(pieces * weights[name] / max(1, sum(weights.values()))))
        tasks[name] = [
            remote.remote(run, found if name == "tuned" else None, works[name].share(i, num), monitor)
            for i in range(num)
        ]
    waiting, done = [task for each in tasks.values() for task in each], 0
    with console.progress("evaluate: answer", sum(len(work.prompts) for work in works.values())) as bar:
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if num_new := len(ray.get(monitor.drain.remote())):
                done += num_new
                bar.update(done)
    return {name: merge(ray.get(each), works[name]) for name, each in tasks.items()}


def _num_shares(work: ScoreTask, most: int) -> int:
    return max(1, min(most, max(len(work.examples), len(work.prompts)) // MIN_SHARE))


def _assemble(
    run: config.RunConfig,
    found: CheckpointRef,
    plan: EvalPlan,
    scored: Mapping[str, ScoreResult],
    models: Mapping[str, Mapping[str, Statistic]],
    answers: Mapping[str, Sequence[str]],
) -> Comparison:
    scores = {name: summary.scores_of(models[name], scored[name].tokens) for name in models}
    differences = {"tuned - base": summary.differences_of(models["tuned"], models["base"])}
    if "few_shot" in models:
        every = range(len(plan.asked))
        base, tuned = (summary.pick(models[name], plan.few_shot_of, every) for name in ("base", "tuned"))
        differences["few_shot - base"] = summary.differences_of(models["few_shot"], base)
        differences["tuned - few_shot"] = summary.differences_of(tuned, models["few_shot"])
    slices = classes = pairs = None
    if run.evaluate.slices is not None:
        groups = [sample.slice for sample in plan.samples]
        slices = summary.slices_of(run.evaluate.slices, groups, plan.asked, models)
    if plan.labels and plan.asked:
        classes = {name: metrics.class_table(said, plan.references, plan.labels) for name, said in answers.items()}
    if plan.pairs:
        said = {name: scored[name].answers[len(plan.asked) :] for name in ("base", "tuned")}
        pairs = summary.pairs_of(plan.pairs, said)
    verdict = summary.verdict_of(differences)
    comparison = Comparison(
        found.step,
        run.config_hash,
        settings_of(run),
        scores["base"],
        scores["tuned"],
        scores.get("few_shot"),
        differences,
        verdict,
        [],
        slices,
        classes,
        pairs,
    )
    return with_gates(comparison, run.evaluate.gates)


def _write(
    run_dir: str,
    run: config.RunConfig,
    plan: EvalPlan,
    scored: Mapping[str, ScoreResult],
    models: Mapping[str, Mapping[str, Statistic]],
    comparison: Comparison,
) -> None:
    """All files of evaluate/; results.json last, since its presence says that all is there."""

    def write(name: str, lines: Sequence[Any]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        storage.write_bytes(storage.join(run_dir, "evaluate", name), text.encode(), private=True)

    write("examples.jsonl", [_example_line(i, plan, scored) for i in range(len(plan.samples))])
    write("generations.jsonl", [_generation_line(k, plan, scored, models) for k in range(len(plan.asked))])
    if plan.pairs:
        at = len(plan.asked)
        said = {name: scored[name].answers[at:] for name in ("base", "tuned")}
        write(
            "pairs.jsonl",
            [
                {"a": a, "b": b, **{name: {"a": s[2 * n], "b": s[2 * n + 1]} for name, s in said.items()}}
                for n, (a, b) in enumerate(plan.pairs)
            ],
        )
    price = run.evaluate.price_per_hour
    speeds = {name: _speed(s, price) for name, s in scored.items() if s.answers}
    storage.write_bytes(storage.join(run_dir, "evaluate", "speed.json"), json.dumps(speeds, indent=1).encode())
    write_results(comparison, run_dir)


def _example_line(i: int, plan: EvalPlan, scored: Mapping[str, ScoreResult]) -> dict[str, Any]:
    sample, places = plan.samples[i], {"few_shot": {place: n for n, place in enumerate(plan.few_shot_of)}}
    line: dict[str, Any] = {"id": sample.id, **({"slice": sample.slice} if sample.slice is not None else {})}
    for name, s in scored.items():
        place = places[name].get(i) if name in places else i
        if place is not None:
            loss, hits, count = s.tokens[place].tolist()
            line |= {"num_trained_tokens": int(count), name: {"loss": loss, "hits": int(hits)}}
    return line


def _generation_line(
    k: int, plan: EvalPlan, scored: Mapping[str, ScoreResult], models: Mapping[str, Mapping[str, Statistic]]
) -> dict[str, Any]:
    sample = plan.samples[plan.asked[k]]
    scores = {
        name: {
            figure: statistic.scores[k]
            for figure, statistic in found.items()
            if statistic.scores is not None and figure not in summary.COSTS and figure != "general_loss"
        }
        for name, found in models.items()
    }
    return {
        "id": sample.id,
        **({"slice": sample.slice} if sample.slice is not None else {}),
        "question": turns_of(sample)[-2].content,
        "reference": plan.references[k],
        **{name: s.answers[k] for name, s in scored.items()},
        "scores": scores,
    }


def _speed(scored: ScoreResult, price_per_hour: float | None) -> dict[str, Any]:
    """How fast a model answered. Latency is an answer's, among the others that were computed beside it."""
    num_tokens = sum(scored.num_tokens)
    half, most = np.percentile(scored.seconds, (50, 95))
    found = {
        "num_answers": len(scored.answers),
        "num_tokens": num_tokens,
        "busy_s": scored.busy_s,
        "tokens_per_s": num_tokens / scored.busy_s,
        "latency_p50_s": float(half),
        "latency_p95_s": float(most),
    }
    if price_per_hour is not None:
        found["cost_per_1000_tokens"] = price_per_hour * scored.busy_s / 3600 / num_tokens * 1000
    return found
