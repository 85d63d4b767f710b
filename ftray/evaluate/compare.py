"""Base and tuned model side by side on the held-out data: loss over all of it, answers to some of it.

Each model is scored by a Ray task of its own, so that both run at once where there is room. Knows runs, checkpoints,
the held-out stream and the engine; nothing of serving.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch

from ftray import config, storage
from ftray.chat import ChatFormat
from ftray.console import Console
from ftray.data.chunks import streams
from ftray.data.heldout import Question, pick_questions
from ftray.data.index import build_index, check_index
from ftray.data.pipeline import heldout_table
from ftray.engine.offline import generate_all
from ftray.engine.protocol import SamplingParams
from ftray.evaluate.metrics import format_score, mean, perplexity, rouge_l
from ftray.evaluate.virtual import generate_virtual
from ftray.model.load import absolute_base, load_base, load_tokenizer, tokenizer_hash
from ftray.model.lora import dtype_of
from ftray.train.loop import heldout_sums
from ftray.train.loss import SummedLoss
from ftray.train.monitor import Monitor
from ftray.train.preflight import check_evaluation
from ftray.train.restore import load_tuned
from ftray.train.timeline import Found

POLL_S = 0.5


@dataclass(frozen=True)
class Scores:
    """One model's figures. loss: mean over all held-out supervised tokens, in nats; the rest over num_answers answers."""

    loss: float
    perplexity: float
    rouge_l: float | None
    format: float | None
    num_supervised: int
    num_answers: int


@dataclass(frozen=True)
class Comparison:
    """What `evaluate/results.json` holds."""

    step: int
    config_hash: str
    settings: dict[str, Any]
    base: Scores
    tuned: Scores


def compare(run: config.Run, run_dir: str, console: Console) -> tuple[Comparison, str]:
    """Scores base and tuned model, writes evaluate/results.json and evaluate/generations.jsonl, prints both.

    Returns the comparison and a held-out question to try the endpoint with. Nothing is computed again while checkpoint
    and settings are the same.

    Needs a started Ray. Raises ConfigError without held-out data or without a checkpoint.
    """
    found = check_evaluation(run, run_dir)
    directory = storage.join(run_dir, "evaluate")
    if (known := read_results(run_dir)) is not None and (known.step, known.settings) == (found.step, _settings(run)):
        console.say(f"evaluation of step {found.step} is there already: {directory}")
    else:
        known = _score_both(run, run_dir, found, directory, console)
    generations = [json.loads(x) for x in storage.read_bytes(storage.join(directory, "generations.jsonl")).splitlines()]
    for line in [*table(known), *side_by_side(generations[: run.evaluate.num_shown])]:
        console.say(line)
    return known, generations[0]["question"] if generations else "Hello"


def read_results(run_dir: str) -> Comparison | None:
    """The last comparison of a run, if there is one."""
    uri = storage.join(run_dir, "evaluate", "results.json")
    if not storage.exists(uri):
        return None
    tree = json.loads(storage.read_bytes(uri))
    return Comparison(
        tree["step"], tree["config_hash"], tree["settings"], Scores(**tree["base"]), Scores(**tree["tuned"])
    )


def _settings(run: config.Run) -> dict[str, Any]:
    """What the figures depend on besides the run's identity."""
    return run.evaluate.model_dump(mode="json", include={"metrics", "format", "num_generations", "max_new_tokens"})


def _score_both(run: config.Run, run_dir: str, found: Found, directory: str, console: Console) -> Comparison:
    there = run.model_copy(update={"model": absolute_base(run.model)})
    load = partial(load_tokenizer, there.model)
    tokenizer = load()
    _, stream = streams(run.data, load)
    assert stream is not None
    data_dir = storage.join(run_dir, "data")
    index = build_index(stream, int(run.data.chunk_mb * 1e6), data_dir, tokenizer_hash(tokenizer))
    check_index(index, stream, "eval", run.data.max_bad_records, data_dir)
    rows = ray.put(heldout_table(index, stream))
    wants_answers = {"rouge", "format"} & set(run.evaluate.metrics)
    questions = (
        pick_questions(index, stream, ChatFormat(tokenizer), run.evaluate.num_generations) if wants_answers else []
    )
    console.say(
        f"evaluate: {index.total('num_supervised')} held-out tokens and {len(questions)} answers, base and step {found.step}"
    )
    monitor = ray.remote(Monitor).options(num_cpus=0).remote()
    score = ray.remote(_score).options(num_cpus=run.scale.cpus_per_worker, num_gpus=_num_gpus())
    tasks = [score.remote(there, checkpoint, rows, questions, monitor) for checkpoint in (None, found)]
    _wait(tasks, monitor, 2 * len(questions), console)
    (base, base_answers), (tuned, tuned_answers) = ray.get(tasks)
    comparison = Comparison(found.step, run.config_hash, _settings(run), base, tuned)
    lines = [
        {"question": q.text, "reference": q.reference, "base": b, "tuned": t}
        for q, b, t in zip(questions, base_answers, tuned_answers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    storage.write_bytes(storage.join(directory, "generations.jsonl"), text.encode())
    storage.write_bytes(storage.join(directory, "results.json"), json.dumps(asdict(comparison), indent=1).encode())
    return comparison


def _wait(tasks: list[Any], monitor: Any, num_answers: int, console: Console) -> None:
    waiting, done = tasks, 0
    with console.progress("evaluate: answer", num_answers) as bar:
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if num_new := len(ray.get(monitor.drain.remote())):
                done += num_new
                bar.update(done)


def _num_gpus() -> float:
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _score(
    run: config.Run, found: Found | None, rows: pa.Table, questions: list[Question], monitor: Any
) -> tuple[Scores, list[str]]:
    """Scores and answers of one model: the base, or a checkpoint of it. A Ray task."""
    torch.set_num_threads(max(1, int(run.scale.cpus_per_worker)))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    precision = run.train.precision
    if found is None:
        model: Any = load_base(run.model, dtype_of(precision), quantize=run.method.type == "qlora")
    else:
        model = load_tuned(run, found, precision)
    model = model.to(device).eval()
    loss_sum, count = heldout_sums(SummedLoss(model), rows, run.micro_batch_size, device)
    params = SamplingParams(max_tokens=run.evaluate.max_new_tokens)
    prompts = [q.prompt_ids for q in questions]
    generate = generate_virtual if hasattr(model, "prompt_encoder") else generate_all
    answered = generate(model, load_tokenizer(run.model), prompts, params, on_done=lambda _: monitor.record.remote({}))
    answers = [a.text.strip() for a in answered]
    references = [q.reference for q in questions]
    loss, metrics = loss_sum / count, run.evaluate.metrics
    rouge = mean(rouge_l(answers, references)) if "rouge" in metrics else None
    exact = mean(format_score(answers, run.evaluate.format or "")) if "format" in metrics else None
    return Scores(loss, perplexity(loss), rouge, exact, int(count), len(answers)), answers


def table(comparison: Comparison) -> list[str]:
    """Lines of the side-by-side table."""
    base, tuned = comparison.base, comparison.tuned
    rows = [
        ("held-out loss", base.loss, tuned.loss, f"{100 * (tuned.loss / base.loss - 1):+.1f}%"),
        ("perplexity", base.perplexity, tuned.perplexity, f"{100 * (tuned.perplexity / base.perplexity - 1):+.1f}%"),
    ]
    for name, b, t in (("ROUGE-L", base.rouge_l, tuned.rouge_l), ("exact format", base.format, tuned.format)):
        if b is not None and t is not None:
            rows.append((name, b, t, f"{t - b:+.3f}"))
    lines = ["", f"{'':<16}{'base':>10}{'tuned':>10}{'change':>10}"]
    lines += [f"{name:<16}{b:>10.4f}{t:>10.4f}{change:>10}" for name, b, t, change in rows]
    over = f"{base.num_supervised} supervised held-out tokens"
    return [*lines, f"(loss over {over}{f', the rest over {base.num_answers} answers' if base.num_answers else ''})"]


def side_by_side(generations: list[dict[str, str]]) -> list[str]:
    """Lines that show answers of both models under each question."""
    lines = []
    for g in generations:
        question = " ".join(g["question"].split())
        lines += ["", f"question   {_cut(question)}", f"reference  {_cut(g['reference'])}"]
        lines += [f"base       {_cut(g['base'])}", f"tuned      {_cut(g['tuned'])}"]
    return lines


def _cut(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
