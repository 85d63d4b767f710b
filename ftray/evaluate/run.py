"""Compares the tuned model with its base on the eval set: losses of all examples, and generated answers to some.

Separate Ray tasks score each model, so they run at the same time if the cluster has resources for that.
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
# Errors that a damaged file can raise.
UNREADABLE = (storage.DamagedFile, storage.MissingFile, LookupError, ValueError, TypeError, AttributeError)
MIN_SHARE = 32  # a task with fewer examples is not worth loading the model again


def compare(run: config.RunConfig, run_dir: str, console: Console, step: int | None = None) -> tuple[Comparison, str]:
    """Scores base and tuned model, writes the files in evaluate/, and prints the comparison. Needs a started Ray.

    Results are reused while checkpoint and settings are the same. Gates are always checked again.

    Args:
        run: The run.
        run_dir: Directory of the run.
        console: Output for the user.
        step: Step of the checkpoint; None selects the best one.

    Returns:
        The comparison, and a question from the eval set to try the endpoint with.

    Raises:
        ConfigError: The run has no eval set or no checkpoint.
    """
    checkpoint = check_evaluation(run, run_dir, step)
    directory = storage.join(run_dir, "evaluate")
    known = known_results(run, run_dir, checkpoint.step)
    if known is not None:
        try:
            lines, question = _render(run, run_dir, known)
            console.say(f"step {checkpoint.step} is already evaluated: {directory}")
            write_results(known, run_dir)  # the gates may have changed
        except UNREADABLE as err:
            console.warn(f"files in {directory} are damaged or missing ({err}); evaluating again")
            known = None
    if known is None:
        known = _compare(run, run_dir, checkpoint, console)
        lines, question = _render(run, run_dir, known)
    for line in lines:
        console.say(line)
    return known, question


def _render(run: config.RunConfig, run_dir: str, known: Comparison) -> tuple[list[str], str]:
    """Lines that show a comparison, and a question of the eval set, from the files in evaluate/."""
    directory = storage.join(run_dir, "evaluate")
    data = storage.read_bytes(storage.join(directory, "generations.jsonl"))
    generations = [storage.parse_object(line) for line in data.splitlines()]
    speed = storage.read_object(storage.join(directory, "speed.json"))
    lines = [*report(known, speed), *side_by_side(generations[: run.evaluate.num_shown])]
    return lines, str(generations[0]["question"]) if generations else "Hello"


def _compare(run: config.RunConfig, run_dir: str, checkpoint: CheckpointRef, console: Console) -> Comparison:
    remote_run = run.model_copy(update={"model": absolute_base(run.model)})
    plan = make_plan(remote_run, run_dir)
    _print_plan(run, plan, checkpoint, console)
    scored = _score_all(remote_run, checkpoint, plan.tasks, console)
    num_questions = len(plan.questions)
    schema, answers = read_schema(run.evaluate), {name: s.answers[:num_questions] for name, s in scored.items()}
    models = {
        name: summary.costs_of(s.tokens, s.general)
        | summary.answers_of(run.evaluate, answers[name], plan.references, plan.labels, schema)
        for name, s in scored.items()
    }
    comparison = _assemble(run, checkpoint, plan, scored, models, answers)
    _write(run_dir, run, plan, scored, models, comparison)
    return comparison


def _print_plan(run: config.RunConfig, plan: EvalPlan, checkpoint: CheckpointRef, console: Console) -> None:
    num_trained_tokens = sum(int(np.asarray(m)[1:].sum()) for e in plan.tasks["base"].examples for _, m in e)
    names = "base, few-shot base" if "few_shot" in plan.tasks else "base"
    console.say(
        f"evaluate: {num_trained_tokens} tokens of the eval set and {len(plan.questions)} answers, {names} and step "
        f"{checkpoint.step}"
    )
    if not plan.questions and set(run.evaluate.metrics) - NO_ANSWERS:
        console.warn("the eval set has no conversation that ends with an answer, so only losses are compared")


def _score_all(
    run: config.RunConfig, checkpoint: CheckpointRef, tasks: Mapping[str, ScoreTask], console: Console
) -> dict[str, ScoreResult]:
    """Splits the task of each model into shares that fit the cluster, and merges the results."""
    channel = ray.remote(DriverChannel).options(num_cpus=0).remote()
    resources = ray.cluster_resources()
    num_gpus = 1.0 if resources.get("GPU", 0) else 0.0
    slots = resources["GPU"] if num_gpus else resources["CPU"] // run.scale.cpus_per_worker
    remote = ray.remote(score).options(num_cpus=run.scale.cpus_per_worker, num_gpus=num_gpus)
    weights = {name: task.weight(run.evaluate.max_new_tokens) for name, task in tasks.items()}
    pieces = max(
        int(slots), 2 * len(tasks)
    )  # on a small cluster more than run at once, so that no task is the last for long
    shares = {}
    for name in sorted(tasks, key=lambda name: -weights[name]):
        num = _num_shares(tasks[name], round(pieces * weights[name] / max(1, sum(weights.values()))))
        shares[name] = [
            remote.remote(run, checkpoint if name == "tuned" else None, tasks[name].share(i, num), channel)
            for i in range(num)
        ]
    waiting, done = [share for each in shares.values() for share in each], 0
    with console.progress("evaluate: answer", sum(len(task.prompts) for task in tasks.values())) as bar:
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if num_new := len(ray.get(channel.drain.remote())):
                done += num_new
                bar.update(done)
    return {name: merge(ray.get(each), tasks[name]) for name, each in shares.items()}


def _num_shares(task: ScoreTask, most: int) -> int:
    return max(1, min(most, max(len(task.examples), len(task.prompts)) // MIN_SHARE))


def eval_data_of(data: config.DataConfig) -> str:
    """The eval data as a verdict names it: `10% of tickets.jsonl`, or the sources' paths."""
    sources = data.eval if isinstance(data.eval, list) else data.train
    paths = ", ".join(source.path for source in sources[:3]) + (" …" if len(sources) > 3 else "")
    return f"{100 * data.eval.fraction:.3g}% of {paths}" if isinstance(data.eval, config.SplitConfig) else paths


def _assemble(
    run: config.RunConfig,
    checkpoint: CheckpointRef,
    plan: EvalPlan,
    scored: Mapping[str, ScoreResult],
    models: Mapping[str, Mapping[str, Statistic]],
    answers: Mapping[str, Sequence[str]],
) -> Comparison:
    scores = {name: summary.scores_of(models[name], scored[name].tokens) for name in models}
    differences = {"tuned - base": summary.differences_of(models["tuned"], models["base"])}
    if "few_shot" in models:
        every = range(len(plan.questions))
        base, tuned = (summary.pick(models[name], plan.few_shot_of, every) for name in ("base", "tuned"))
        differences["few_shot - base"] = summary.differences_of(models["few_shot"], base)
        differences["tuned - few_shot"] = summary.differences_of(tuned, models["few_shot"])
    slices = classes = pairs = None
    if run.evaluate.slices is not None:
        groups = [sample.slice for sample in plan.samples]
        slices = summary.slices_of(run.evaluate.slices, groups, plan.questions, models)
    if plan.labels and plan.questions:
        classes = {name: metrics.class_table(texts, plan.references, plan.labels) for name, texts in answers.items()}
    if plan.pairs:
        pair_answers = {name: scored[name].answers[len(plan.questions) :] for name in ("base", "tuned")}
        pairs = summary.pairs_of(plan.pairs, pair_answers)
    verdict = summary.verdict_of(differences, eval_data_of(run.data))
    comparison = Comparison(
        checkpoint.step,
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
    """Writes all files of evaluate/. results.json is last: it marks the others as complete."""

    def write(name: str, lines: Sequence[Any]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        storage.write_bytes(storage.join(run_dir, "evaluate", name), text.encode(), private=True)

    write("examples.jsonl", [_example_line(i, plan, scored) for i in range(len(plan.samples))])
    write("generations.jsonl", [_generation_line(k, plan, scored, models) for k in range(len(plan.questions))])
    if plan.pairs:
        at = len(plan.questions)
        answers = {name: scored[name].answers[at:] for name in ("base", "tuned")}
        write(
            "pairs.jsonl",
            [
                {"a": a, "b": b, **{name: {"a": s[2 * n], "b": s[2 * n + 1]} for name, s in answers.items()}}
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
    sample = plan.samples[plan.questions[k]]
    scores = {
        name: {
            figure: statistic.scores[k]
            for figure, statistic in figures.items()
            if statistic.scores is not None and figure not in summary.COSTS and figure != "general_loss"
        }
        for name, figures in models.items()
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
    """Generation speed of a model. Latency is that of an answer in a batch with others."""
    num_tokens = sum(scored.num_tokens)
    half, most = np.percentile(scored.seconds, (50, 95))
    speed = {
        "num_answers": len(scored.answers),
        "num_tokens": num_tokens,
        "busy_s": scored.busy_s,
        "tokens_per_s": num_tokens / scored.busy_s,
        "latency_p50_s": float(half),
        "latency_p95_s": float(most),
    }
    if price_per_hour is not None:
        speed["cost_per_1000_tokens"] = price_per_hour * scored.busy_s / 3600 / num_tokens * 1000
    return speed
