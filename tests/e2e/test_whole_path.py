"""From records to an answer over HTTP with the commands of the README, on local disk: one run, looked at from all sides.

Tests are in the order in which a user would do the same things; those that end an endpoint come last.
"""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from ftray import storage
from ftray.chat import ChatFormat, Conversation, Message
from tests import tiny
from tests.e2e.command import Command, Ended, Place

NUM_STEPS, NUM_PROMPTS, MAX_TOKENS, TIED = 8, 20, 24, 1e-4
NOISE = re.compile(r"INFO|WARNING|DEBUG|\(pid=|\(\w+ pid=|\x1b|\r|%\|")  # how libraries' output and progress bars look


def write_model(directory: Path) -> None:
    """The tiny model, kept to tokens that are readable text by themselves, so that equal texts mean equal tokens."""
    model, tokenizer = tiny.make_model(), tiny.make_tokenizer()
    with torch.no_grad():
        for token in range(tiny.VOCAB_SIZE):
            if "�" in tokenizer.decode([token]):
                model.lm_head.weight[token] = 0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def ended(place: Place) -> Ended:
    """The whole file, once."""
    write_model(place.directory / "model")
    tiny.write_records(place.directory / "data/a", 60)
    tiny.write_records(place.directory / "data/b", 40, seed=2, shape="prompt-completion")
    tiny.write_records(place.directory / "heldout", 16, seed=1)
    place.write(
        data__train=[{"path": "data/a"}, {"path": "data/b"}],
        data__eval=[{"path": "heldout"}],
        train__max_steps=NUM_STEPS,
        checkpoint__every=4,
    )
    return place.ftray("run", "run.yaml")


@pytest.fixture
def run_dir(place: Place, ended: Ended) -> Path:
    assert ended.code == 0, ended.out + ended.err
    return place.directory / "runs/tiny"


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_it_prints_is_plain_lines_and_the_libraries_go_to_a_named_file(
    place: Place, ended: Ended, run_dir: Path
) -> None:
    assert ended.err == ""
    assert [line for line in ended.out.splitlines() if NOISE.search(line)] == []
    log = Path(ended.line("output of Ray and other libraries: ").split()[-1])
    assert log.is_relative_to(place.cache)
    assert log.stat().st_size > 0
    assert "data.train: 100 records" in ended.out
    assert f"step {NUM_STEPS}/{NUM_STEPS} · loss" in ended.out


def test_base_and_tuned_stand_side_by_side_in_figures_and_answers(ended: Ended, run_dir: Path) -> None:
    results = json.loads((run_dir / "evaluate/results.json").read_text())
    for name, key in (("eval loss", "loss"), ("perplexity", "perplexity"), ("ROUGE-L", "rouge_l")):
        figures = [results[which][key] for which in ("base", "tuned")]
        assert ended.line(name).removeprefix(name).split()[:2] == [f"{figure:.4f}" for figure in figures]
    assert results["tuned"]["loss"] < results["base"]["loss"]
    assert results["step"] == NUM_STEPS
    generations = read_lines(run_dir / "evaluate/generations.jsonl")
    assert len(generations) == results["tuned"]["num_answers"] == 4
    assert [set(g) for g in generations] == [{"id", "question", "reference", "base", "tuned", "scores"}] * 4
    assert [g["tuned"] for g in generations] != [g["base"] for g in generations]
    assert ended.out.count("\nreference  ") == 2


def test_the_run_directory_holds_all_of_the_run(run_dir: Path) -> None:
    for step in (4, NUM_STEPS):
        checkpoint = str(run_dir / f"checkpoints/step-{step:06d}")
        assert storage.verify_directory(checkpoint) == []
        manifest = storage.read_manifest(checkpoint)
        assert manifest is not None
        assert manifest["meta"]["progress"]["step"] == step
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    named = {"loss", "num_tokens", "learning_rate", "grad_norm", "tokens_per_s", "data_wait_s"}
    assert all(named <= line.keys() for line in lines)
    assert any(len(repr(line["loss"])) > 12 for line in lines), "losses are rounded"
    identity = json.loads((run_dir / "run.json").read_text())
    assert identity["config"]["train"]["max_steps"] == NUM_STEPS
    assert {"ftray", "ray", "torch", "deepspeed"} <= identity["versions"].keys()
    lineage = identity["lineage"]
    assert [Path(f["uri"]).name for f in lineage["data"]["files"]] == [
        *("part-000.jsonl", "part-001.jsonl"),  # of a
        "part-000.jsonl",  # of b
        "part-000.jsonl",  # held out
    ]
    for name in ("model", "model/merged"):
        assert json.loads((run_dir / name / "lineage.json").read_text())["id"] == lineage["id"]
        assert f"| id | {lineage['id']} |" in (run_dir / name / "MODEL_CARD.md").read_text()
    assert list((run_dir / "data").glob("index-*.json"))
    events = [line for file in (run_dir / "events").iterdir() for line in read_lines(file)]
    assert [e["event"] for e in events] == ["began", "start", "ended"]
    assert (events[1]["workers"], events[1]["device"], events[-1]["how"]) == (2, "CPU", "finished")
    assert storage.verify_directory(str(run_dir / "model")) == []


def test_the_report_holds_the_data_the_answers_and_what_happened(place: Place, run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text()
    results = json.loads((run_dir / "evaluate/results.json").read_text())
    for words in (
        f"trained to the end, {NUM_STEPS} steps",
        f"{results['tuned']['loss']:.4f}",
        "data/a",
        "Tokens per record",
    ):
        assert words in page, words
    for generation in read_lines(run_dir / "evaluate/generations.jsonl"):
        assert html.escape(generation["tuned"]) in page
    assert "no index" not in page
    before = page.encode()
    (run_dir / "report.html").unlink()
    ended = place.ftray("report", "run.yaml")
    assert ended.out == f"report: {run_dir}/report.html\n"
    assert (run_dir / "report.html").read_bytes() == before, "the same from what is stored alone"


def test_the_last_lines_say_where_all_is_and_what_to_type_next(place: Place, ended: Ended, run_dir: Path) -> None:
    *_, said = ended.out.partition("the run 'tiny' is complete")
    assert f"Everything is in {run_dir}:" in said
    assert "serve it:               ftray serve run.yaml\n" in said
    assert "train on your own data" not in said  # it is
    answer = json.loads((run_dir / "evaluate/endpoint.json").read_text())["answer"]
    assert answer.split()[0] in ended.line("answer     ")


def test_the_answers_of_a_run_can_be_given_to_people(place: Place, run_dir: Path) -> None:
    sheet = place.ftray("evaluate", "human", str(run_dir), "--csv", "sheet.csv")
    assert sheet.code == 0, sheet.err
    with (place.directory / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["question"] for row in rows) == sorted(
        g["question"] for g in read_lines(run_dir / "evaluate/generations.jsonl")
    )


def test_a_command_leaves_no_process_behind(place: Place, run_dir: Path) -> None:
    assert place.left_over() == []


def test_the_same_command_again_says_without_ray_that_the_run_is_complete(place: Place, run_dir: Path) -> None:
    before = sorted(place.cache.rglob("*")), (run_dir / "metrics.jsonl").stat().st_mtime_ns
    again = place.ftray("run", "run.yaml")
    assert again.code == 0
    assert "the run 'tiny' is complete" in again.out
    assert "output of Ray" not in again.out
    assert (sorted(place.cache.rglob("*")), (run_dir / "metrics.jsonl").stat().st_mtime_ns) == before
    train = place.ftray("train", "runs/tiny")
    assert (train.code, train.err) == (0, "")
    assert f"training of 'tiny' is complete ({NUM_STEPS} steps)" in train.out


def test_a_complete_run_that_its_gates_refuse_ends_with_3_and_keeps_its_model(place: Place, run_dir: Path) -> None:
    passed = place.ftray("run", "run.yaml", "evaluate.gates.loss.min_gain=0.001")
    assert (passed.code, passed.err) == (0, "")
    refused = place.ftray("run", "run.yaml", "evaluate.gates={loss: {min_gain: 99}, perplexity: {max: 1}}")
    assert refused.code == 3
    assert refused.err.startswith("ftray: the gates reject this model: loss gained ")
    assert "but needs at least 99 (min_gain); perplexity is " in refused.err
    assert refused.err.count("\n") == 1
    assert "the run 'tiny' is complete" in refused.out
    assert "serve it" not in refused.out
    assert "output of Ray" not in refused.out
    assert storage.verify_directory(str(run_dir / "model")) == []


def test_each_step_alone_on_a_copy_of_the_directory_gives_the_same(place: Place, run_dir: Path) -> None:
    copy = place.directory / "elsewhere/tiny"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("evaluate", "model"))
    too_early = place.ftray("serve", "elsewhere/tiny")
    assert too_early.code == 2
    assert "ftray export" in too_early.err
    evaluate = place.ftray("evaluate", "elsewhere/tiny")
    assert evaluate.code == 0, evaluate.err
    for name in ("results.json", "generations.jsonl", "examples.jsonl"):
        assert (copy / "evaluate" / name).read_bytes() == (run_dir / "evaluate" / name).read_bytes()
    assert not (copy / "model").exists()
    export = place.ftray("export", "elsewhere/tiny")
    assert export.code == 0, export.err
    assert "next: ftray serve elsewhere/tiny" in export.out
    for name in ("adapter_model.safetensors", "merged/model.safetensors", "merged/tokenizer.json"):
        assert (copy / "model" / name).read_bytes() == (run_dir / "model" / name).read_bytes()
    again = place.ftray("export", "elsewhere/tiny")
    assert f"the model of step {NUM_STEPS} already exists" in again.out


@pytest.fixture(scope="module")
def endpoint(place: Place, ended: Ended) -> Command:
    """`ftray serve` on the run's directory."""
    command = place.start("serve", "runs/tiny", "serve.port=0")
    command.wait_for("(Ctrl-C drains and stops)")
    return command


def client_of(command: Command) -> openai.OpenAI:
    found = re.search(r"serving tiny at (http://127\.0\.0\.1:\d+/v1)", command.text)
    assert found, command.text
    return openai.OpenAI(base_url=found[1], api_key="none is needed", max_retries=0, timeout=120)


def conversations() -> list[Conversation]:
    pairs = list(tiny._pairs(NUM_PROMPTS, seed=1))
    return [Conversation((Message("user", question), Message("assistant", answer))) for question, answer in pairs]


def greedy(model: Any, prompt: list[int], stops: tuple[int, ...]) -> tuple[list[int], float]:
    """Greedy answer by transformers' own `generate`, and the least distance of the two best logits on its way."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def test_endpoint_merged_model_and_adapter_give_the_same_greedy_tokens(
    place: Place, run_dir: Path, endpoint: Command
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model/merged", dtype="auto")
    assert merged.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(place.directory / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model/merged")
    chat, client = ChatFormat(tokenizer), client_of(endpoint)
    questions = [c.until(1) for c in conversations()]
    prompts = [chat.encode_prompt(turns) for turns in questions]
    of_base = [greedy(base, prompt, chat.stop_token_ids)[0] for prompt in prompts]
    adapted = PeftModel.from_pretrained(base, run_dir / "model").eval()

    answers, num_ties = [], 0
    for turns, prompt in zip(questions, prompts, strict=True):
        tokens, least = greedy(merged, prompt, chat.stop_token_ids)
        of_adapter, least_of_adapter = greedy(adapted, prompt, chat.stop_token_ids)
        reply = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": turns.messages[0].content}],
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(prompt)
        answers.append(tokens)
        if min(least, least_of_adapter) <= TIED:
            num_ties += 1
            continue
        assert of_adapter == tokens
        assert reply.choices[0].message.content == tokenizer.decode(tokens, skip_special_tokens=True)
        assert "�" not in reply.choices[0].message.content
        assert reply.usage.completion_tokens == len(tokens)
    assert num_ties < NUM_PROMPTS / 4
    assert answers != of_base, "the adapter must change answers, or equal ones prove nothing"
    assert len({tuple(a) for a in answers}) > NUM_PROMPTS / 2


def test_what_the_endpoint_asks_is_the_beginning_of_what_training_saw(run_dir: Path) -> None:
    from transformers import AutoTokenizer

    served = ChatFormat(AutoTokenizer.from_pretrained(run_dir / "model/merged"))
    trained = ChatFormat(tiny.make_tokenizer())
    for turns in conversations():
        prompt, example = served.encode_prompt(turns.until(1)), trained.encode_example(turns)
        assert example.input_ids[: len(prompt)] == prompt
        assert not any(example.loss_mask[: len(prompt)])
        assert example.loss_mask[len(prompt)]


def test_a_stream_brings_the_whole_answer_and_its_usage(endpoint: Command) -> None:
    client = client_of(endpoint)
    assert [model.id for model in client.models.list()] == ["model", "tiny"]
    ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Zoë meets a cat."}], "temperature": 0}
    whole = client.chat.completions.create(**ask, max_tokens=MAX_TOKENS)
    *chunks, last = client.chat.completions.create(
        **ask, max_tokens=MAX_TOKENS, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage == whole.usage


def test_what_is_published_is_served_within_seconds_and_so_is_its_removal(place: Place, endpoint: Command) -> None:
    client = client_of(endpoint)
    ask: Any = {
        "messages": [{"role": "user", "content": "Zoë meets a cat."}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    texts = {
        name: client.chat.completions.create(model=name, **ask).choices[0].message.content for name in ("model", "tiny")
    }

    def wait_for(*ids: str) -> None:
        deadline = time.monotonic() + 60
        while [model.id for model in client.models.list()] != list(ids):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    published = place.ftray("publish", "runs/tiny", "--name", "polite")
    assert published.code == 0, published.err
    assert "published model:polite, version 0001-" in published.out
    wait_for("model", "tiny", "model:polite")
    reply = client.chat.completions.create(model="model:polite", **ask)
    assert reply.choices[0].message.content == texts["tiny"] != texts["model"]
    assert place.ftray("publish", "runs/tiny", "--name", "polite", "--remove").code == 0
    wait_for("model", "tiny")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="model:polite", **ask)


def test_on_sigterm_the_endpoint_ends_its_streams_and_then_itself(place: Place, endpoint: Command) -> None:
    client, started, texts = client_of(endpoint), threading.Event(), []
    ask: Any = {"model": "tiny", "prompt": "then a", "temperature": 0, "max_tokens": 900}
    whole = client.completions.create(**ask)
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 200, "too short to be interrupted"

    def read() -> None:
        for chunk in client.completions.create(**ask, stream=True):
            texts.append(chunk.choices[0].text)
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(60)
    endpoint.process.send_signal(signal.SIGTERM)
    reader.join(120)
    assert "".join(texts) == whole.choices[0].text
    assert endpoint.wait().code == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    assert place.left_over() == []


def test_ctrl_c_in_its_terminal_ends_the_endpoint(place: Place, run_dir: Path) -> None:
    command = place.start("serve", "run.yaml", "serve.port=0", terminal=True)
    command.wait_for("(Ctrl-C drains and stops)")
    command.wait_for("try: curl")
    client = client_of(command)
    assert client.models.retrieve("tiny").id == "tiny"
    command.press_ctrl_c()
    assert command.wait().code == 0
    assert place.left_over() == []
