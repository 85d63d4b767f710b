"""Bad input: one sentence with key or file, value and remedy, exit code 2, no traceback, no training worker started.

The commands run in this process, as `ftray` would run them. Those that end before Ray starts do so under a Ray that
refuses to start; those whose data has to be read first share one Ray, under a trainer that refuses to start.
"""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from ftray import storage
from ftray.cli import main, session
from tests import cluster, tiny
from tests.e2e.command import Ended, Place, assert_refused
from tests.fork_server import ForkServer

Prepare = Callable[[Path], Any]
ANSWERED = {"messages": [{"role": "user", "content": "What is heard?"}, {"role": "assistant", "content": "meow"}]}
UNANSWERED = {"messages": [{"role": "user", "content": "What is heard?"}]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data that are good."""
    root = tmp_path_factory.mktemp("parts")
    tiny.write_tiny_model(root / "model")
    tiny.write_records(root / "data", 40)
    return root


@pytest.fixture
def desk(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_server: ForkServer) -> Place:
    """A fresh working directory with that model, that data and a good run file; it is the current one."""
    made = Place(tmp_path, worker_server)
    for name, value in worker_server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("model", "data"):
        (made.directory / name).symlink_to(parts / name)
    made.write()
    monkeypatch.chdir(made.directory)
    monkeypatch.setenv("FTRAY_CACHE", str(made.cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("RAY_ADDRESS", "FTRAY_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return made


class Typed:
    """Calls the command in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: str) -> Ended:
        self._capfd.readouterr()
        code = main.main(list(arguments))
        text = self._capfd.readouterr()
        return Ended(code, text.out, text.err, 0.0)


@pytest.fixture
def typed(capfd: pytest.CaptureFixture[str]) -> Typed:
    return Typed(capfd)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)


@dataclass(frozen=True)
class Case:
    """Arguments after `run.yaml`, what makes the input bad, and what the sentence must name."""

    name: str
    fragments: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    prepare: Prepare = lambda _: None
    verb: str = "run"
    target: str = "run.yaml"


def write(name: str, text: str) -> Prepare:
    def prepare(directory: Path) -> None:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return prepare


def append(text: str) -> Prepare:
    def prepare(directory: Path) -> None:
        with (directory / "run.yaml").open("a") as file:
            file.write(text)

    return prepare


def copy_model(without: str = "", **files: str) -> Prepare:
    """`other`: the model less some files, with others written anew."""

    def prepare(directory: Path) -> None:
        shutil.copytree(directory / "model", directory / "other")
        for path in (directory / "other").glob(without) if without else ():
            path.unlink()
        for name, text in files.items():
            (directory / "other" / name.replace("__", ".")).write_text(text)

    return prepare


def make_encoder(directory: Path) -> None:
    copy_model()(directory)
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 64, "vocab_size": 512}
    (directory / "other/config.json").write_text(json.dumps(config))


def make_adapter(directory: Path) -> None:
    write("other/adapter_config.json", "{}")(directory)
    write("other/adapter_model.safetensors", "")(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / "model" / name, directory / "other")


def write_run_json(text: str) -> Prepare:
    return write("runs/tiny/run.json", text)


def damage_trained_run(directory: Path) -> None:
    write_run_json("[]")(directory)
    write("step/state.json", "{}")(directory)
    storage.commit_directory(directory / "step", "runs/tiny/checkpoints/step-000001", {"progress": {"step": 1}})


def cut_weights(directory: Path) -> None:
    copy_model()(directory)
    path = directory / "other/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_shard(directory: Path) -> None:
    copy_model()(directory)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (directory / "other/model.safetensors.index.json").write_text(json.dumps(index))


def make_headless(directory: Path) -> None:
    copy_model()(directory)
    config = json.loads((directory / "other/config.json").read_text())
    (directory / "other/config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))


def more_tokens(directory: Path) -> None:
    """A model whose tokenizer got a token that its embeddings lack."""
    copy_model()(directory)
    data = json.loads((directory / "other/tokenizer.json").read_text())
    content = {"id": tiny.VOCAB_SIZE, "content": "<|new|>", "special": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"].append(content | flags)
    (directory / "other/tokenizer.json").write_text(json.dumps(data))


OTHER = ("model.base=other",)
DATA = ("data.train.0.path=bad",)
HELDOUT = ("data.eval={fraction: 0.2}",)
CASES = [
    # the run file
    Case("no-file", ("nothing.yaml does not exist", "use a run file such as"), target="nothing.yaml"),
    Case(
        "a-directory",
        ("run.yaml can't be read",),
        target="x/run.yaml",
        prepare=lambda d: (d / "x/run.yaml").mkdir(parents=True),
    ),
    Case(
        "binary",
        ("can't be read", "YAML"),
        target="b.yaml",
        prepare=lambda d: (d / "b.yaml").write_bytes(b"\xff\x00\xfe"),
    ),
    Case("empty-file", ("e.yaml has no keys",), target="e.yaml", prepare=write("e.yaml", "")),
    Case(
        "a-list", ("l.yaml has no keys", "name, model and data"), target="l.yaml", prepare=write("l.yaml", "- a\n- b\n")
    ),
    Case("broken-yaml", ("y.yaml, line 2", "correct"), target="y.yaml", prepare=write("y.yaml", "name: a\n data: {")),
    Case("no-run-directory", ("somewhere is neither a run file", "run.json"), target="somewhere"),
    Case("damaged-run-json", ("runs/tiny/run.json is damaged",), target="runs/tiny", prepare=write_run_json("{")),
    Case("damaged-run-json-of-a-file", ("runs/tiny/run.json is damaged",), prepare=damage_trained_run),
    # its keys and values
    Case(
        "unknown-key",
        ("run.yaml", "learning_rat", "did you mean train.learning_rate?"),
        prepare=append("learning_rat: 1\n"),
    ),
    Case("key-twice", ("run.yaml, line", "'name' appears twice"), prepare=append("name: other\n")),
    Case("unknown-override", ("train.max_step", "did you mean train.max_steps?"), ("train.max_step=3",)),
    Case("empty-override", ("'' is not an override", "key.sub=value"), ("",)),
    Case("no-override", ("'max_steps' is not an override", "key.sub=value"), ("max_steps",)),
    Case("no-value", ("train.max_steps", "an integer"), ("train.max_steps=many",)),
    Case("wrong-type", ('train.learning_rate ("fast")', "a number above 0"), ("train.learning_rate=fast",)),
    Case("bool", ("train.max_steps (true)", "an integer"), ("train.max_steps=true",)),
    Case("not-finite", ("train.learning_rate (Infinity)", "a number above 0"), ("train.learning_rate=.inf",)),
    Case("negative", ("train.learning_rate (-1.0)", "above 0"), ("train.learning_rate=-1.0",)),
    Case("name-with-a-path", ('name ("../x")', "letters, digits"), ("name=../x",)),
    Case("name-missing", ("name", "text"), ("name=",)),
    Case("batch", ("train.global_batch_size (5)", "num_workers (2)", "try 4 or 6"), ("train.global_batch_size=5",)),
    Case("port", ("serve.port (-1)", "0"), ("serve.port=-1",)),
    Case("no-space", ("tune.space is missing", "add it"), ("tune.num_trials=3",)),
    Case("no-source", ("data.train", "non-empty list"), ("data.train=[]",)),
    Case("no-heldout", ("data.eval", "empty list"), ("data.eval=[]",)),
    Case("ours", ("deepspeed.overrides.fp16", "train.precision"), ("deepspeed.overrides.fp16.enabled=true",)),
    Case(
        "qlora-and-zero-3",
        ("qlora", "zero_stage 3", "use zero_stage 2"),
        ("method.type=qlora", "deepspeed.zero_stage=3"),
    ),
    # the data's files
    Case("no-data", ("/bad: no such file or directory", "data.train"), DATA),
    Case("no-data-file", ("/bad.jsonl does not exist", "data.train"), ("data.train.0.path=bad.jsonl",)),
    Case(
        "empty-directory", ("/bad: no such file or directory, or nothing in it",), DATA, lambda d: (d / "bad").mkdir()
    ),
    Case("empty-source", ("/bad: the file is empty", "add records"), DATA, write("bad/a.jsonl", "")),
    Case("other-files", ("/bad contains a.docx, but no .jsonl",), DATA, write("bad/a.docx", "x")),
    Case("no-glob", ("/bad/*.jsonl: no such file",), ("data.train.0.path=bad/*.jsonl",)),
    Case("no-heldout-data", ("/bad: no such file", "data.eval"), ("data.eval=[{path: bad}]",)),
    Case(
        "no-embedded-data",
        ("embedded:x is not an embedded data set", "use embedded:"),
        ("data.train.0.path=embedded:x",),
    ),
    # the model
    Case("no-model", ("model.base ./other is not a directory", "hub id"), ("model.base=./other",)),
    Case("no-such-model", ("model.base other", "not a local directory", "hub"), OTHER),
    Case("no-model-in-it", ("model.base other", "no config (config.json)"), OTHER, lambda d: (d / "other").mkdir()),
    Case("no-tokenizer", ("model.base other", "no tokenizer (tokenizer*)"), OTHER, copy_model("tokenizer*")),
    Case("no-weights", ("model.base other", "no weights (*.safetensors)"), OTHER, copy_model("*.safetensors")),
    Case("an-adapter", ("model.base other", "adapter", "base"), OTHER, make_adapter),
    Case("an-encoder", ("model.base other", "BertModel", "causal language model"), OTHER, make_encoder),
    Case("no-head", ("model.base other", "LlamaModel", "causal language model"), OTHER, make_headless),
    Case(
        "more-tokens",
        ("model.base other", f"the id {tiny.VOCAB_SIZE} ('<|new|>')", f"end at {tiny.VOCAB_SIZE - 1}", "resize"),
        OTHER,
        more_tokens,
    ),
    Case("cut-weights", ("model.base other", "model.safetensors is damaged", "again"), OTHER, cut_weights),
    Case("a-shard-less", ("model.base other lacks model-2.safetensors (1 of 2", "again"), OTHER, lose_a_shard),
    Case("broken-config", ("model.base other", "config", "is not JSON"), OTHER, copy_model(config__json="{")),
    Case("broken-tokenizer", ("model.base other", "tokenizer", "is not JSON"), OTHER, copy_model(tokenizer__json="{")),
    Case("broken-weights", ("model.base other", "model.safetensors"), OTHER, copy_model(model__safetensors="<html>")),
    Case("no-template", ("model.base other", "no chat template", "instruct"), OTHER, copy_model("chat_template*")),
    Case("no-embedded-model", ("embedded:x is not an embedded model", "use embedded:"), ("model.base=embedded:x",)),
    Case(
        "no-target",
        ("method.target_modules", "nothing", "q_proj", "all-linear"),
        ("method.target_modules=[q_proj, nothing]",),
    ),
    # where the run is kept
    Case("storage-in-a-file", ("storage/tiny", "is a file"), ("storage=storage",), write("storage", "")),
    Case("storage-read-only", ("/proc/tiny", "can't be written"), ("storage=/proc",)),
    Case("storage-of-another-kind", ("gs://bucket", "s3://bucket/path"), ("storage=gs://bucket",)),
    # a step before its time
    Case(
        "evaluate-first",
        ("runs/tiny has no checkpoint", "ftray train"),
        ("data.eval={fraction: 0.1}",),
        verb="evaluate",
    ),
    # what evaluation needs
    Case(
        "empty-eval-split",
        ("data.eval.fraction (1e-06)", "selects no record", "raise it"),
        ("data.eval.fraction=1e-6",),
    ),
    Case(
        "no-heldout-record",
        ("data.eval: bad has no usable record", "remove"),
        ("data.eval=[{path: bad}]",),
        write("bad/a.jsonl", "\n\n"),
    ),
    Case(
        "gate-on-nothing",
        ("evaluate: gates.bleu needs the metric 'bleu'", "add it to metrics"),
        (*HELDOUT, "evaluate.gates.bleu.min_gain=1"),
    ),
    Case("no-metric", ('evaluate.metrics.0 ("accuracy")', "classes"), ("evaluate.metrics=[accuracy]",)),
    Case(
        "no-schema",
        ("evaluate.json_schema s.json does not exist",),
        (*HELDOUT, "evaluate.metrics=[json]", "evaluate.json_schema=s.json"),
    ),
    Case(
        "broken-schema",
        ("evaluate.json_schema s.json is not a JSON schema", "'objekt'"),
        (*HELDOUT, "evaluate.metrics=[json]", "evaluate.json_schema=s.json"),
        write("s.json", '{"type": "objekt"}'),
    ),
    Case(
        "no-general-set",
        ("evaluate.general", "/bad", "correct the path"),
        (*HELDOUT, "evaluate.metrics=[general]", "evaluate.general=bad"),
    ),
    Case(
        "broken-pairs",
        ("evaluate.pairs p.jsonl, line 2", '"b"'),
        (*HELDOUT, "evaluate.pairs=p.jsonl"),
        write("p.jsonl", '{"a": "x", "b": "y"}\n{"a": "x"}\n'),
    ),
    Case(
        "no-bertscore-model",
        ("evaluate.", "bertscore"),
        (*HELDOUT, "evaluate.metrics=[bertscore]", "evaluate.bertscore_model=bad"),
    ),
    Case(
        "no-library",
        ("evaluate.metrics has bleu", "pip install 'ftray[evaluate]'"),
        (*HELDOUT, "evaluate.metrics=[loss, bleu]"),
    ),
    Case("evaluate-nothing", ("data.eval is missing", "add data.eval"), verb="evaluate"),
    Case("export-first", ("runs/tiny has no checkpoint", "ftray train"), verb="export"),
    Case("serve-first", ("runs/tiny/model/merged", "ftray export"), verb="serve"),
    Case("no-key", ("serve.host is 0.0.0.0", "FTRAY_API_KEY"), ("serve.host=0.0.0.0",), verb="serve"),
    Case("no-vllm", ("serve.engine is vllm", "pip install 'ftray[vllm]'", "transformers"), ("serve.engine=vllm",)),
    Case("no-vllm-checked", ("serve.engine is vllm", "not installed"), ("serve.engine=vllm",), verb="check"),
    Case(
        "no-vllm-to-sweep",
        ("serve.engine is vllm", "not installed"),
        (
            "data.eval={fraction: 0.1}",
            "serve.engine=vllm",
            "tune={space: {train.learning_rate: {type: choice, values: [0.1, 0.2]}}, num_trials: 2}",
        ),
    ),
    Case("no-vllm-to-serve", ("serve.engine is vllm", "not installed"), ("serve.engine=vllm",), verb="serve"),
    Case("no-host", ("serve.host 203.0.113.7", "cannot be used"), ("serve.host=203.0.113.7",), verb="serve"),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_sentence_before_ray_starts(
    case: Case, desk: Place, typed: Typed, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.prepare(desk.directory)
    if case.name == "no-library":
        monkeypatch.setattr("ftray.evaluate.plan.LIBRARIES", {"bleu": ("no_such_module", "evaluate")})
    if case.name.startswith("no-vllm"):
        monkeypatch.setitem(sys.modules, "vllm", None)
    if case.name == "no-host":
        monkeypatch.setenv("FTRAY_API_KEY", "a key")
        shutil.copytree(desk.directory / "model", desk.directory / "runs/tiny/model/merged")
    refused = typed(case.verb, case.target, *case.overrides)
    assert_refused(refused, *case.fragments)
    if case.target == "run.yaml" and case.name != "damaged-run-json-of-a-file":
        # What was refused binds the name to nothing: with the mistake corrected the same name is free.
        assert not (desk.directory / "runs/tiny/run.json").exists()


def test_a_port_that_is_taken_is_refused_before_ray_starts(desk: Place, typed: Typed, no_ray: None) -> None:
    shutil.copytree(desk.directory / "model", desk.directory / "runs/tiny/model/merged")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = typed("serve", "run.yaml", f"serve.port={port}")
        assert_refused(refused, f"port {port}", "set another serve.port")


def test_a_learning_rate_as_people_write_it_is_a_number(desk: Place, typed: Typed) -> None:
    for text in ("2e-4", "1e3", ".5"):
        shown = typed("check", "--fast", "run.yaml", f"train.learning_rate={text}", "--json")
        assert shown.code == 0, shown.err
        assert json.loads(shown.out)["train"]["learning_rate"] == float(text)


def test_several_mistakes_are_told_at_once(desk: Place, typed: Typed) -> None:
    refused = typed("check", "--fast", "run.yaml", "train.epoch=1", "serve.port=x", "evaluate.metrics=[blue]")
    assert refused.code == 2
    first, *rest = refused.err.splitlines()
    assert first == "ftray: run.yaml:"
    assert [key for line in rest for key in ("train.epoch", "evaluate.metrics", "serve.port") if key in line] == [
        "train.epoch",
        "evaluate.metrics",
        "serve.port",
    ]


def test_the_command_itself_says_it_in_one_line(desk: Place) -> None:
    """As a process: what Python prints at its end would show here."""
    assert_refused(desk.ftray("check", "--fast", "run.yaml", "train.max_step=3"), "did you mean train.max_steps?")
    usage = desk.ftray("trian", "run.yaml")
    assert usage.code == 2
    assert "Did you mean 'train'?" in usage.err
    desk.env["RAY_ADDRESS"] = "127.0.0.1:9"
    refused = desk.ftray("train", "run.yaml")
    assert_refused(refused, "RAY_ADDRESS 127.0.0.1:9", "correct or unset it")
    assert desk.left_over() == []


def test_output_that_nobody_reads_any_more_is_no_fault(desk: Place) -> None:
    command = [sys.executable, "-m", "ftray.cli.main", "check", "--fast", "run.yaml"]
    ends: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=desk.directory, env=desk.env, **ends) as process:
        process.stdout.close()  # type: ignore[union-attr] - as `| head` does
        assert (process.stderr.read(), process.wait(60)) == ("", 141)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    with cluster.local_ray():
        yield


@pytest.fixture
def shared_ray(one_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process use the module's Ray."""
    monkeypatch.setattr(session, "ray_session", lambda _: nullcontext())


@pytest.fixture
def no_workers(shared_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.torch import TorchTrainer

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("training workers were started")

    monkeypatch.setattr(TorchTrainer, "fit", refuse)


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_gzip(data: bytes) -> Prepare:
    def prepare(directory: Path) -> None:
        (directory / "bad").mkdir()
        (directory / "bad/a.jsonl.gz").write_bytes(data)

    return prepare


HALF = gzip.compress(lines(*[ANSWERED] * 30).encode())[:-20]
READ_CASES = [
    Case(
        "no-answer",
        (
            "data.train: 1 bad record (1 no_answer). The limit data.max_bad_records is 0",
            "bad/a.jsonl, line 3",
            "data.max_bad_records",
        ),
        DATA,
        write("bad/a.jsonl", lines(ANSWERED, ANSWERED, UNANSWERED, ANSWERED)),
    ),
    Case(
        "too-long",
        ("2 bad records (2 too_long)", "bad/a.jsonl, line 2", "data.max_seq_len (128)", "data.max_bad_records"),
        DATA,
        write("bad/a.jsonl", lines(ANSWERED, *[{"prompt": "a cow " * 200, "completion": "moo"}] * 2)),
    ),
    Case(
        "csv-named-jsonl",
        ("3 bad records (3 invalid_json)", "bad/a.jsonl, line 1", "not JSON"),
        DATA,
        write("bad/a.jsonl", "prompt,completion\na,b\nc,d\n"),
    ),
    Case(
        "one-more-than-allowed",
        ("2 bad records", "data.max_bad_records is 1", "line 1"),
        (*DATA, "data.max_bad_records=1"),
        write("bad/a.jsonl", lines(UNANSWERED, UNANSWERED, ANSWERED)),
    ),
    Case(
        "no-known-shape",
        ("(q, r)", "line 1", "columns: {user: …, assistant: …}"),
        DATA,
        write("bad/a.jsonl", lines({"q": "a", "r": "b"})),
    ),
    Case("blank-lines-only", ("bad has no usable record", "data.train"), DATA, write("bad/a.jsonl", "\n\n")),
    Case(
        "not-an-array", ("bad/a.json is not a JSON array", "one record a line"), DATA, write("bad/a.json", '{"a":\n1}')
    ),
    Case("half-a-gzip", ("bad/a.jsonl.gz is not a whole gzip file", "write it again"), DATA, write_gzip(HALF)),
    Case("no-parquet", ("bad/a.parquet",), DATA, write("bad/a.parquet", "PAR1 and no more")),
    Case(
        "no-csv-column",
        ("1 no_answer", "bad/a.csv, record 0: r is missing"),
        (*DATA, "data.train.0.columns={user: q, assistant: r}"),
        write("bad/a.csv", "q,s\na,b\n"),
    ),
    Case(
        "batch-above-the-data",
        ("packed sequences", "train.global_batch_size (4096)", "lower it"),
        ("train.global_batch_size=4096",),
    ),
    Case(
        "heldout-too-long",
        ("data.eval: 1 bad record", "bad/a.jsonl, line 1"),
        ("data.eval=[{path: bad}]",),
        write("bad/a.jsonl", lines({"prompt": "a cow " * 200, "completion": "moo"})),
    ),
    Case(
        "more-workers-than-cpus",
        ("scale needs 64 CPUs", "lower one"),
        ("scale.num_workers=64", "train.global_batch_size=64"),
    ),
    Case("no-such-gpu", ("scale.accelerator A100 is not in this cluster", "no GPU"), ("scale.accelerator=A100",)),
]


@pytest.mark.parametrize("case", READ_CASES, ids=[case.name for case in READ_CASES])
def test_a_sentence_before_a_training_worker_starts(case: Case, desk: Place, typed: Typed, no_workers: None) -> None:
    case.prepare(desk.directory)
    assert_refused(typed("train", "run.yaml", *case.overrides), *case.fragments)


def test_corrected_settings_may_use_the_name_and_allowed_bad_records_are_quarantined_by_place_and_rule(
    desk: Place, typed: Typed, shared_ray: None
) -> None:
    """What the sentences ask for changes settings: the name must not be bound to the wrong ones by then."""
    long = {"prompt": "a cow " * 150, "completion": "moo"}
    good = [{"prompt": f"{i} cows. What is heard?", "completion": "moo"} for i in range(60)]
    write("bad/a.jsonl", lines(*good[:2], UNANSWERED, long, *good[2:]) + "not JSON\n")(desk.directory)
    changes = (*DATA, "train.max_steps=1", "data.max_bad_records=2")
    assert_refused(typed("train", "run.yaml", *changes), "3 bad records", "1 too_long", "data.max_bad_records is 2")

    done = typed("train", "run.yaml", *changes, "data.max_seq_len=512")
    assert done.code == 0, done.err
    assert "data.train: 61 records" in done.out
    assert "2 bad records quarantined" in done.out
    assert (desk.directory / "runs/tiny/checkpoints/step-000001/manifest.json").exists()
    path = desk.directory / "bad/a.jsonl"
    kept = (desk.directory / "runs/tiny/data/quarantine/train.jsonl").read_text().splitlines()
    assert [(k["uri"], k["position"], k["rule"]) for k in map(json.loads, kept)] == [
        (str(path), path.read_text().index(json.dumps(UNANSWERED)), "no_answer"),
        (str(path), path.read_text().index("not JSON"), "invalid_json"),
    ]
    assert json.loads(kept[1])["excerpt"] == "not JSON"
    assert_refused(typed("train", "run.yaml", *changes), "data.max_seq_len (512 → 128)", "Choose another name")
