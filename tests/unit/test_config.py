"""The run file: what it takes, what it refuses and in which words, what follows from it. No Ray, no torch."""

import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray import config
from ftray.cli import main
from ftray.config import load_run, parse_run
from ftray.config.aliases import ALIASES
from ftray.config.loader import Schema
from ftray.errors import ConfigError

ROOT = Path(__file__).parents[2]

# The example of DESIGN.md section 3.
DESIGNED = """
name: llama3-8b-support
storage: s3://acme-ml/runs               # a run writes only under <storage>/<name>/
model: {base: meta-llama/Llama-3.1-8B-Instruct, revision: 0e9e39f}
method: {type: lora, rank: 16, alpha: 32, dropout: 0.05, target_modules: all-linear}
data:
  max_seq_len: 4096
  train:
    - {path: s3://acme-data/support/, weight: 0.7}
    - {path: s3://acme-data/general/*.parquet, weight: 0.3}   # general data against forgetting
  eval: {fraction: 0.1, stratify: category}
train: {epochs: 3, global_batch_size: 128, micro_batch_size: auto, learning_rate: 2.0e-4, precision: bf16, seed: 0}
deepspeed: {zero_stage: 2}
scale: {num_workers: 16, accelerator: A100}
checkpoint: {every: 200, keep: 3}
evaluate: {every: 200, metrics: [loss, rouge], early_stopping: 3}
tune: {num_trials: 8, space: {train.learning_rate: {type: loguniform, low: 5.0e-5, high: 5.0e-4}}}
serve: {min_replicas: 1, max_replicas: 4, target_ongoing_requests: 8}
"""
SMALL = "name: a\nmodel: {base: org/m}\ndata: {train: [{path: p}]}\n"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(SMALL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """What load_run says, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_run(path, list(overrides))
    return str(caught.value).removeprefix(f"{path}: ")


def test_the_designed_run_file_parses_key_by_key() -> None:
    tree = yaml.safe_load(DESIGNED)
    parsed = parse_run(copy.deepcopy(tree), "design").model_dump(mode="json", exclude_unset=True)
    assert parsed == tree
    run = parse_run(tree, "design")
    assert (run.directory, run.micro_batch_size, run.accumulation_steps) == (
        "s3://acme-ml/runs/llama3-8b-support",
        1,
        8,
    )


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.y*ml")), ids=lambda path: path.name)
def test_every_file_in_jobs_parses_and_is_named_as_its_run(path: Path) -> None:
    assert load_run(path).name == path.stem.replace("evaluate-", "lora-")  # evaluating again is of another's run


UNKNOWN = {
    "train.learning_rte=1": "train.learning_rate",  # a typo
    "train.maxSteps=1": "train.max_steps",
    "train.max-steps=1": "train.max_steps",
    "train.lr=1": "train.learning_rate",
    "data.max_seq_length=1": "data.max_seq_len",
    "data.train.0.wieght=1": "data.train.weight",
    "modle={base: x}": "model",
    "learning_rate=1": "train.learning_rate",  # the right name in the wrong place
    "train.rank=8": "method.rank",
    "data.num_workers=2": "scale.num_workers",
    "deepspeed.max_seq_len=2": "data.max_seq_len",
    "warm_up=0.1": "train.warmup",
}


@pytest.mark.parametrize(("override", "closest"), UNKNOWN.items())
def test_an_unknown_key_names_the_closest_one_in_whatever_section(run_file: Path, override: str, closest: str) -> None:
    key = override.partition("=")[0]
    assert refusal(run_file, override) == f"unknown key {key}; did you mean {closest}?"


def test_an_unknown_key_like_no_other_names_the_page_that_lists_them(run_file: Path) -> None:
    assert refusal(run_file, "zzz=1") == "unknown key zzz; remove it; docs/run-file.md lists all keys"
    assert (ROOT / "docs" / "run-file.md").exists()


WRONG = {
    "train.max_steps=ten": '("ten") must be an integer of at least 1',
    "train.max_steps=1.5": "(1.5) must be an integer of at least 1",
    "train.max_steps=0": "(0) must be at least 1",
    "train.max_steps=true": "(true) must be an integer of at least 1",
    "train.learning_rate=yes": "(true) must be a number above 0",
    "train.learning_rate=.nan": "(NaN) must be a number above 0",
    "train.learning_rate=.inf": "(Infinity) must be a number above 0",
    "train.learning_rate=-1": "(-1) must be above 0",
    "train.learning_rate=fast": '("fast") must be a number above 0',
    "train.warmup=1": "(1) must be below 1",
    "train.seed=4294967296": "(4294967296) must be below 4294967296",
    "train.precision=fp8": '("fp8") must be one of bf16, fp16, fp32',
    "train=5": "(5) must be a mapping with epochs, max_steps, global_batch_size, ",
    "name=7": "(7) must be text; put it in quotes",
    "name=": "(null) must be text",
    "storage=''": '("") must be non-empty text',  # it would be the file system's root
    "model.base=''": '("") must be non-empty text',
    "model.trust_remote_code=perhaps": '("perhaps") must be true or false',
    "data.train=[]": "([]) must be a non-empty list (each entry a mapping with path, ",
    "data.train=p": '("p") must be a non-empty list (each entry a mapping with path, ',
    "data.labels=[]": "([]) must be a non-empty list (each entry non-empty text)",
    "data.labels=[a, b, a]": "lists 'a' more than once; list each label once",
    "data.labels=[' ']": "contains an empty label; remove it",
    "data.clean.contamination=on": "(true) must be one of report, drop, off",
    "data.clean.quality=keep": '("keep") must be one of report, drop, off',
    "data.chunk_mb=2000": "(2000) must be at most 1024",
    "data.eval=[]": "is an empty list; add a source, or remove the key",
    "data.eval=0.1": "(0.1) must be {fraction: 0.1} or a list of sources [{path: …}]",
    "data.eval={path: p}": ": must be {fraction: 0.1} or a list of sources [{path: …}]",
    "deepspeed.overrides=3": "(3) must be a mapping",
    "deepspeed.zero_stage=4": "(4) must be at most 3",
    "serve.port=70000": "(70000) must be at most 65535",
    # keys that may be one thing or another still get one sentence
    "train.micro_batch_size=x": "(\"x\") must be an integer of at least 1 or 'auto'",
    "train.micro_batch_size=0": "(0) must be an integer of at least 1 or 'auto'",
    "train.micro_batch_size=true": "(true) must be an integer of at least 1 or 'auto'",
    "method.target_modules=3": "(3) must be 'all-linear' or a non-empty list (each entry text)",
    "method.target_modules=[]": "([]) must be 'all-linear' or a non-empty list (each entry text)",
    "checkpoint.every=0": "(0) must be a number of steps from 1 up, or like '1 epoch', '10 min', '2 h'",
    "checkpoint.every=0 epochs": "(\"0 epochs\") must be a number of steps from 1 up, or like '1 epoch', '10 min', '2 h'",
    "checkpoint.every=often": "(\"often\") must be a number of steps from 1 up, or like '1 epoch', '10 min', '2 h'",
    "checkpoint.every=true": "(true) must be a number of steps from 1 up, or like '1 epoch', '10 min', '2 h'",
}


@pytest.mark.parametrize(("override", "words"), WRONG.items())
def test_a_wrong_value_gets_one_sentence_with_key_value_and_remedy(run_file: Path, override: str, words: str) -> None:
    key, text = override.partition("=")[0], refusal(run_file, override)
    assert "\n" not in text
    assert text.startswith(f"{key}{words}" if words[0] == ":" else f"{key} {words}")


DEEPER = {
    "data.eval={fraction: 2}": "data.eval.fraction (2) must be below 1",
    "data.eval={}": "the key data.eval.fraction is missing; add it",
    "data.eval=[{path: p, weigt: 1}]": "unknown key data.eval.0.weigt; did you mean data.eval.weight?",
    "data.eval=[p]": 'data.eval.0 ("p") must be a mapping with path, weight, format, columns, ignore, tools',
    "data.eval={fraction: 0.1, stratify: a, group: b}": (
        "data.eval: stratify and group exclude each other, because a group is never split; remove one of them"
    ),
    "method.target_modules=[q_proj, 3]": "method.target_modules.1 (3) must be text; put it in quotes",
    "evaluate.metrics=[loss, blue]": (
        'evaluate.metrics.1 ("blue") must be one of loss, rouge, bleu, chrf, bertscore, exact, extract, format, json, '
        "classes, general"
    ),
    "data.train.0.columns={user: q, foo: a}": (
        "unknown key data.train.0.columns.foo; use 'system', 'user', 'assistant', 'messages', 'tools'"
    ),
    "model={}": "the key model.base is missing; add it",
}


@pytest.mark.parametrize(("override", "sentence"), DEEPER.items())
def test_what_is_wrong_inside_a_value_is_named_there_and_only_there(
    run_file: Path, override: str, sentence: str
) -> None:
    assert refusal(run_file, override) == sentence


TOGETHER = {
    ("scale.num_workers=16", "train.micro_batch_size=2", "train.global_batch_size=100"): (
        "train.global_batch_size (100) must be a multiple of micro_batch_size × num_workers (2 × 16 = 32); try 96 or 128"
    ),
    ("scale.num_workers=3", "train.global_batch_size=8"): (
        "train.global_batch_size (8) must be a multiple of num_workers (3); try 6 or 9"
    ),
    ("scale.num_workers=8", "train.global_batch_size=5"): (
        "train.global_batch_size (5) must be a multiple of num_workers (8); try 8"
    ),
    ("data.train=[{path: a, weight: 1}, {path: b}]",): (
        "data.train has sources with and without a weight (b has none); set weight for all sources or for none"
    ),
    ("data.pack_text=concatenate", "data.packing=false"): (
        "data: pack_text: concatenate and packing: false exclude each other; remove one of them"
    ),
    ("data.train.0.format=columns",): (
        "data.train.0: format is 'columns' but the key columns is missing; add columns: {user: …, assistant: …}"
    ),
    ("data.train.0.columns={user: q}",): "data.train.0: columns must name at least user and assistant, or messages",
    ("data.train.0.columns={messages: m, user: q}",): (
        "data.train.0: columns names messages beside user or assistant; name either the column of turns, or the columns of roles"
    ),
    ("data.train.0.columns={messages: 'a {m}'}",): (
        "data.train.0: columns.messages must be the name of a column, not a template"
    ),
    (
        "data.train.0.columns={user: '{q', assistant: a}",
    ): "data.train.0: '{q' has a { without its counterpart; write {{ for the character itself",
    (
        "data.train.0.columns={user: '[x]{q}', assistant: a}",
    ): "data.train.0: '[x]{q}' has brackets without a column in them; write [[ and ]] for the characters themselves",
    (
        "data.train.0.columns={user: '[{q}', assistant: a}",
    ): "data.train.0: '[{q}' has a [ without its counterpart; write [[ for the character itself",
    ("data.train.0.columns={user: q, assistant: a}", "data.train.0.ignore=[b]"): (
        "data.train.0: ignore has no effect with columns, which name all that is used; remove it"
    ),
    ("data.train.0.format=text", "data.train.0.tools=t.json"): (
        "data.train.0: tools and format 'text' exclude each other; remove one of them"
    ),
    ("data.train.0.columns={user: q, assistant: a}", "data.train.0.format=alpaca"): (
        "data.train.0: columns and format 'alpaca' exclude each other; remove one of them"
    ),
    ("method.type=qlora", "deepspeed.zero_stage=3"): (
        "method.type qlora with deepspeed.zero_stage 3 is not possible: 4-bit weights can't be sharded; use zero_stage 2"
    ),
    ("evaluate.metrics=[format]",): (
        "evaluate: the metric 'format' and the key format (a regular expression) need each other; set both"
    ),
    ("evaluate.metrics=[format]", "evaluate.format='[a'"): (
        "evaluate: format '[a' is not a regular expression: unterminated character set at position 0"
    ),
    ("evaluate.metrics=[extract]",): (
        "evaluate: the metric 'extract' and the key extract (a regular expression) need each other; set both"
    ),
    ("evaluate.bertscore_model=m",): (
        "evaluate: the metric 'bertscore' and the key bertscore_model (a directory) need each other; set both"
    ),
    ("evaluate.json_schema=s.json",): (
        "evaluate: json_schema needs the metric 'json'; add it to metrics, or remove json_schema"
    ),
    ("evaluate.gates={rougel: {min_gain: 0.1}}",): ("evaluate: gates.rougel is not a metric; did you mean rouge_l?"),
    ("evaluate.gates={general_loss: {max_rise: 0.1}}",): (
        "evaluate: gates.general_loss needs the metric 'general', which is not computed; add it to metrics"
    ),
    ("evaluate.gates.loss={}",): (
        "evaluate.gates.loss: is a gate without a limit; set min_gain, max_rise, max_drop, min or max"
    ),
    ("evaluate.gates.loss.min_gain=0.1", "data.eval="): (
        "evaluate.gates needs eval data; add data.eval: {fraction: 0.1}"
    ),
    ("evaluate.early_stopping=3",): ("evaluate: early_stopping needs evaluate.every, the steps between eval losses"),
    ("serve.tensor_parallel=2",): "serve: tensor_parallel (2) needs engine vllm; set serve.engine: vllm, or 1",
    ("serve.min_replicas=3",): "serve: max_replicas (1) is below min_replicas (3); raise it",
}


@pytest.mark.parametrize(("overrides", "sentence"), TOGETHER.items())
def test_keys_that_do_not_go_together_are_named_with_the_remedy(
    run_file: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    assert refusal(run_file, *overrides) == sentence


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "-a", "a-", "a b", "a" * 64, "ä", "a\n"])
def test_a_name_that_could_leave_its_directory_is_refused(name: str) -> None:
    tree = {**yaml.safe_load(SMALL), "name": name}
    with pytest.raises(ConfigError, match="must be 1 to 63 letters, digits"):
        parse_run(tree, "f")


def test_every_wrong_key_has_its_line(run_file: Path) -> None:
    lines = refusal(run_file, "train.epoch=2", "train.seed=-1", "data.train.0.path=''").split("\n")
    assert lines == [
        f"{run_file}:",
        '  data.train.0.path ("") must be non-empty text',
        "  train.seed (-1) must be at least 0",
        "  unknown key train.epoch; did you mean train.epochs?",
    ]


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "0.0002", "2E-4"])
def test_numbers_may_be_written_as_yaml_does_not_read_them(run_file: Path, text: str) -> None:
    assert load_run(run_file, [f"train.learning_rate={text}"]).train.learning_rate == 2e-4


BROKEN = {
    "name: a\nname: b\n": (2, "the key 'name' appears twice; correct the YAML there"),
    "name: a\ntrain: {seed: 1, seed: 1}\n": (2, "the key 'seed' appears twice; correct the YAML there"),
    "name: a\nmodel: {base: x\ndata:\n": (3, "; correct the YAML there"),
    "name: a\n\tmodel: x\n": (2, "that cannot start any token; correct the YAML there"),
    "name: !!python/object:os.system a\n": (1, "; correct the YAML there"),
}


@pytest.mark.parametrize(("text", "told"), BROKEN.items())
def test_broken_yaml_names_its_line(run_file: Path, text: str, told: tuple[int, str]) -> None:
    run_file.write_text(text)
    said = refusal(run_file)
    assert said.startswith(f"{run_file}, line {told[0]}, column ")
    assert said.endswith(told[1])
    assert "\n" not in said


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "- a\n", "just text\n", "7\n"])
def test_a_file_without_keys_is_refused(run_file: Path, text: str) -> None:
    run_file.write_text(text)
    assert refusal(run_file) == f"{run_file} has no keys; a run file needs at least name, model and data"


@pytest.mark.parametrize(
    "content",
    [b"name: \xff\xfe", b"name: a\x00b", b"a: " + b"[" * 5000, b"name: 2024-13-45", b"? [a]\n: b", b"1: 2\nnull: 3"],
    ids=["not UTF-8", "NUL", "deep", "no date", "list as key", "no names"],
)
def test_any_rubbish_is_a_sentence_and_never_a_traceback(run_file: Path, content: bytes) -> None:
    run_file.write_bytes(content)
    assert str(run_file) in refusal(run_file)


def test_a_value_that_holds_itself_is_a_sentence_too(run_file: Path) -> None:
    run_file.write_text(SMALL + "storage: &s [*s]\ntrain: &t {epochs: *t}\n")
    assert f"{run_file}, line " in refusal(run_file)
    assert "an alias refers to a node that contains it" in refusal(run_file)


def test_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert refusal(missing) == f"{missing} does not exist; use a run file such as jobs/quickstart.yaml"
    assert refusal(tmp_path).startswith(f"{tmp_path} can't be read")


def test_overrides_reach_into_sections_and_lists_and_make_sections(run_file: Path) -> None:
    overrides = [
        "train.max_steps=10",
        "data.train.0.path=s3://b/*.jsonl",
        "evaluate.metrics=[loss]",
        "name=b",
        "data.eval=",
    ]
    run = load_run(run_file, overrides)
    assert (run.train.max_steps, run.data.train[0].path, run.name) == (10, "s3://b/*.jsonl", "b")
    assert (run.evaluate.metrics, run.data.eval) == (["loss"], None)


NO_OVERRIDES = {
    "train.max_steps": "'train.max_steps' is not an override; write key.sub=value, for example train.max_steps=10",
    "=3": "'=3' is not an override; write key.sub=value, for example train.max_steps=10",
    "train..seed=3": "'train..seed=3' is not an override; write key.sub=value, for example train.max_steps=10",
    "data.train.1.path=x": "data.train.1.path: '1' is not an index of data.train, a list of 1; use 0 to 0",
    "data.train.first.path=x": "data.train.first.path: 'first' is not an index of data.train, a list of 1; use 0 to 0",
    "data.train.-1=x": "data.train.-1: '-1' is not an index of data.train, a list of 1; use 0 to 0",
    "name.x=3": 'name.x: name is "a" and has no keys; override it as a whole',
    "train.seed={": "override train.seed, line 1, column ",
}


@pytest.mark.parametrize(("override", "sentence"), NO_OVERRIDES.items())
def test_a_wrong_override_says_how_to_write_it(run_file: Path, override: str, sentence: str) -> None:
    assert refusal(run_file, override).startswith(sentence)


def test_an_override_changes_one_place_even_where_yaml_names_two(run_file: Path) -> None:
    run_file.write_text("name: a\nmodel: {base: m}\ndata: {train: [&s {path: p}], eval: [*s]}\n")
    run = load_run(run_file, ["data.train.0.path=other"])
    assert run.data.train[0].path == "other"
    assert run.data.eval is not None
    assert run.data.eval[0].path == "p"  # type: ignore[index]


# Another value for each key; those of the first five sections change the result of a run.
OTHER: dict[str, dict[str, Any]] = {
    "model": {"base": "o", "revision": "r", "trust_remote_code": True},
    "method": {
        "type": "full",
        "rank": 3,
        "alpha": 3.0,
        "dropout": 0.3,
        "target_modules": ["q_proj"],
        "rslora": True,
        "dora": True,
        "num_virtual_tokens": 3,
        "freeze": ["x"],
        "base_precision": "fp8",
    },
    "data": {
        "max_seq_len": 33,
        "train": [{"path": "o"}],
        "eval": {"fraction": 0.3},
        "packing": False,
        "too_long": "split",
        "pack_text": "concatenate",
        "labels": ["yes", "no"],
        "train_on": {"reasoning": False},
        "clean": {"duplicates": "drop"},
        "chunk_mb": 3.0,
    },
    "train": {
        "epochs": 3.0,
        "max_steps": 3,
        "global_batch_size": 3,
        "micro_batch_size": 2,
        "learning_rate": 3.0,
        "schedule": "linear",
        "warmup": 0.3,
        "weight_decay": 0.3,
        "max_grad_norm": 3.0,
        "optimizer": "adamw-8bit",
        "precision": "fp32",
        "seed": 3,
        "rewind_after": 3,
        "label_smoothing": 0.1,
    },
    "deepspeed": {"zero_stage": 1, "offload": "optimizer", "overrides": {"a": 1}},
}
SAME: dict[str, dict[str, Any]] = {
    "tracking": {"trackers": ["tensorboard"]},
    "data": {"max_bad_records": 3},  # how much may go wrong changes no row and no weight
    "train": {"max_bad_steps": 3, "hang_timeout_s": 3.0, "gradient_checkpointing": "full"},
    "scale": {
        "num_workers": {"min": 1, "max": 2},
        "accelerator": "A100",
        "cpus_per_worker": 2.0,
        "gpus_per_worker": 0.5,
        "max_failures": 1,
        "price_per_hour": 3.0,
        "wait_s": 3.0,
    },
    "checkpoint": {"every": 3, "keep": 1},
    "evaluate": {
        "every": 3,
        "metrics": ["loss"],
        "num_generations": 3,
        "num_shown": 3,
        "max_new_tokens": 3,
        "early_stopping": 3,
        "format": "x",
        "extract": "x",
        "json_schema": "s.json",
        "bertscore_model": "m",
        "general": "g",
        "few_shot": 3,
        "slices": "c",
        "pairs": "p.jsonl",
        "gates": {},
        "price_per_hour": 3.0,
        "num_examples": 3,
        "human": {"samples": 3},
        "judge": {"url": "http://x/v1", "model": "m"},
    },
    "serve": {
        "engine": "vllm",
        "tensor_parallel": 3,
        "host": "h",
        "port": 3,
        "min_replicas": 0,
        "max_replicas": 3,
        "target_ongoing_requests": 3.0,
        "target_first_token_s": 3.0,
        "upscale_delay_s": 3.0,
        "downscale_delay_s": 3.0,
        "max_queued_requests": 3,
        "max_tokens": 3,
        "max_answer_s": 3,
        "max_adapters": 3,
        "max_adapter_mb": 3,
        "trusted_keys": ["ed25519:" + "A" * 43 + "="],
        "cors_origins": ["https://a.example"],
        "feedback": {"max_bytes": 100},
        "requests_per_minute": 3,
        "tokens_per_minute": 3,
        "tokens_per_day": 3,
        "ab": {"a": 0.9, "b": 0.1},
        "canary": None,
    },
}


def changed(section: str, key: str, value: object) -> config.RunConfig:
    tree = yaml.safe_load(SMALL)
    tree.setdefault(section, {})[key] = value
    if key == "early_stopping":
        tree[section]["every"] = 3
    if section == "evaluate" and key in ("every", "early_stopping"):
        tree["data"]["eval"] = {"fraction": 0.1}
    if key == "freeze":
        tree[section]["type"] = "full"
    metric = {"json_schema": "json", "bertscore_model": "bertscore"}.get(key, key)
    if metric in ("format", "extract", "json", "bertscore"):
        tree[section]["metrics"] = [metric]
    if key == "optimizer":
        tree["deepspeed"] = {"zero_stage": 0}
    if key == "tensor_parallel":
        tree[section]["engine"] = "vllm"
    return parse_run(tree, "f")


def test_the_hash_covers_what_changes_the_result_and_nothing_else() -> None:
    base = parse_run(yaml.safe_load(SMALL), "f").config_hash
    hashes = {f"{s}.{k}": changed(s, k, v).config_hash for s, keys in OTHER.items() for k, v in keys.items()}
    assert [key for key, found in hashes.items() if found == base] == []
    assert len(set(hashes.values())) == len(hashes)
    heldout = changed("data", "eval", {"fraction": 0.1}).config_hash
    same = {f"{s}.{k}": changed(s, k, v).config_hash for s, keys in SAME.items() for k, v in keys.items()}
    assert [key for key, found in same.items() if found not in (base, heldout)] == []
    assert {key for key, found in same.items() if found == heldout} == {"evaluate.every", "evaluate.early_stopping"}
    assert parse_run({**yaml.safe_load(SMALL), "name": "b", "storage": "s3://b"}, "f").config_hash == base
    tune = {"num_trials": 3, "space": {"train.seed": {"type": "choice", "values": [3]}}}
    assert parse_run({**yaml.safe_load(SMALL), "tune": tune}, "f").config_hash == base, (
        "what a sweep tries is not what it trains"
    )
    # and no key is forgotten by this test
    sections = {
        name: field.annotation
        for name, field in config.RunConfig.model_fields.items()
        if name not in ("name", "storage", "tune")
    }
    for name, section in sections.items():
        assert set(section.model_fields) == {*OTHER.get(name, {}), *SAME.get(name, {})}, name  # type: ignore[union-attr]


def test_what_is_only_reported_changes_no_hash_and_what_is_dropped_does() -> None:
    hashes = {mode: changed("data", "clean", {"quality": mode}).config_hash for mode in ("report", "off", "drop")}
    assert hashes["report"] == hashes["off"] != hashes["drop"]
    short = [{"quality": mode, "min_answer_chars": 9} for mode in ("report", "drop")]
    assert changed("data", "clean", short[0]).config_hash == hashes["report"]
    assert changed("data", "clean", short[1]).config_hash != hashes["drop"]


def test_no_rule_changes_the_hash_unless_it_drops() -> None:
    base = parse_run(yaml.safe_load(SMALL), "f").config_hash
    rules = [name for name in config.CleanConfig.model_fields if name != "min_answer_chars"]
    for rule in rules:
        assert changed("data", "clean", {rule: "off"}).config_hash == base
        assert changed("data", "clean", {rule: "drop"}).config_hash != base
    assert changed("data", "clean", {"min_answer_chars": 9}).config_hash == base
    drops = [changed("data", "clean", {"quality": "drop", "min_answer_chars": n}).config_hash for n in (1, 9)]
    assert drops[0] != drops[1]


def test_off_is_understood_although_yaml_reads_it_as_false(run_file: Path) -> None:
    clean = load_run(run_file, ["data.clean.duplicates=off", "data.clean.contamination='off'"]).data.clean
    assert (clean.duplicates, clean.contamination, clean.quality) == ("off", "off", "report")


def test_the_hash_does_not_change_when_a_default_is_written_out_or_the_file_is_reordered() -> None:
    run = parse_run(yaml.safe_load(SMALL), "f")
    whole = run.model_dump(mode="json")
    assert parse_run(dict(reversed(whole.items())), "f").config_hash == run.config_hash


def test_differing_keys_are_told_with_both_values() -> None:
    old, new = changed("train", "seed", 1).identity(), changed("train", "seed", 2).identity()
    assert config.differing_keys(old, new) == ["train.seed (1 → 2)"]


def test_a_parsed_run_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_run(yaml.safe_load(SMALL), "f").train.seed = 3


def test_checkpoint_intervals_are_read() -> None:
    def section(every: object) -> config.CheckpointConfig:
        return config.CheckpointConfig(every=every)  # type: ignore[arg-type]

    assert (section(7).every_epochs, section(7).every_s) == (None, None)
    assert (section("1 epoch").every_epochs, section("0.5 epochs").every_epochs) == (1.0, 0.5)
    assert [section(e).every_s for e in ("30 s", "10 min", "2h", "1 epoch")] == [30.0, 600.0, 7200.0, None]


def test_check_ends_with_code_2_and_one_line(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check", "--fast", str(run_file), "train.learning_rat=1"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"ftray: {run_file}: unknown key train.learning_rat; did you mean train.learning_rate?\n"
    assert main.main(["check", "--fast", str(run_file.with_name("none.yaml"))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_refuses_a_deepspeed_setting_that_another_key_decides(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["check", "--fast", str(run_file), "deepspeed.overrides={zero_optimization: {stage: 3}}"]) == 2
    told = "deepspeed.overrides.zero_optimization.stage is set by deepspeed.zero_stage; change that instead"
    assert capsys.readouterr().err == f"ftray: {told}\n"


def test_the_page_for_users_of_other_trainers_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_migrating.py"))
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    assert text == page["render"](), "write it again: python docs/make_migrating.py"


def test_all_weights_are_trained_at_a_lower_rate_than_adapters_unless_the_run_file_says_otherwise() -> None:
    tree: dict[str, Any] = {"name": "r", "model": {"base": "m"}, "data": {"train": [{"path": "p"}]}}
    full = {**tree, "method": {"type": "full"}}
    assert config.parse_run(tree, "f").train.learning_rate == 2e-4
    assert config.parse_run(full, "f").train.learning_rate == 2e-5
    assert config.parse_run({**full, "train": {"epochs": 2}}, "f").train.learning_rate == 2e-5
    assert config.parse_run({**full, "train": {"learning_rate": 1e-3}}, "f").train.learning_rate == 1e-3


def test_check_prints_what_follows_from_the_file(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train.global_batch_size=8", "scale.num_workers=2", "train.micro_batch_size=2", "train.max_steps=5"]
    assert main.main(["check", "--fast", str(run_file), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step       8 packed sequences = 2 workers × micro-batch 2 × 2 accumulated" in lines
    assert "tokens     at most 16384 per step" in lines
    assert "length     5 steps" in lines


def test_the_reference_page_is_up_to_date() -> None:
    render = runpy.run_path(str(ROOT / "docs" / "make_run_file.py"))["render"]
    page = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    assert page == render(), "write it anew: python docs/make_run_file.py"


def test_every_key_is_described() -> None:
    docs = runpy.run_path(str(ROOT / "docs" / "make_run_file.py"))["key_docs"]()
    bare = [
        f"{section.__name__}.{name}"
        for section in config.Section.__subclasses__()
        if section is not config.RunConfig
        for name, field in section.model_fields.items()
        if (section.__name__, name) not in docs and field.annotation not in config.Section.__subclasses__()
    ]
    assert bare == []


def test_overrides_may_stand_before_and_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check", "--fast", "jobs/quickstart.yaml", "train.seed=3", "--json", "train.epochs=2"]) == 0
    shown = json.loads(capsys.readouterr().out)["train"]
    assert (shown["seed"], shown["epochs"]) == (3, 2.0)
    assert main.main(["check", "--fast", "jobs/quickstart.yaml", "--jsn"]) == 2
    assert "No such option: --jsn. Did you mean --json?" in capsys.readouterr().err


def test_a_double_dash_in_front_of_an_override_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check", "--fast", "jobs/quickstart.yaml", "--train.seed=3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["seed"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "x.yaml"], "No such command 'trian'. Did you mean 'train'?"),
        (["data", "indx", "x.yaml"], "No such command 'indx'. Did you mean 'index'?"),
        (["train", "x.yaml", "--form", "y"], "No such option: --form. Did you mean --from?"),
        (["export", "x.yaml", "--stpe=3"], "No such option: --stpe. Did you mean --step?"),
        (["train", "x.yaml", "--lora_r", "8"], "No such option: --lora_r; did you mean method.rank?"),
        (["train", "x.yaml", "--bf16"], "No such option: --bf16; set train.precision to bf16"),
        (
            ["train", "x.yaml", "--train.seed", "8"],
            "--train.seed is a setting; write train.seed=VALUE or --train.seed=VALUE",
        ),
        (["export", "x.yaml", "--step", "0"], "Invalid value for '--step'"),
        (["train"], "Missing argument"),
    ],
)
def test_a_wrong_word_is_a_usage_error_with_a_suggestion(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words) == 2
    assert message in capsys.readouterr().err


def test_options_that_exclude_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["export", "x.yaml", "--quantize", "nf4", "--to", "gguf"]) == 2
    assert capsys.readouterr().err == "ftray: --quantize and --to cannot be combined; use one of them\n"


def test_version_and_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main.main(["--version"]) == 0
    assert re.fullmatch(r"ftray \d+\.\d+\.\d+\n", capsys.readouterr().out)
    monkeypatch.setenv("_FTRAY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "ftray tr")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert main.main([]) == 0
    assert capsys.readouterr().out.split() == ["train"]


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("lora_r", "did you mean method.rank?"),
        ("num_train_epochs", "did you mean train.epochs?"),
        ("save_steps", "did you mean checkpoint.every?"),
        ("output_dir", "did you mean storage?"),
        ("train.per_device_train_batch_size", "did you mean train.micro_batch_size?"),
        ("gradient_accumulation_steps", "set train.global_batch_size; the accumulation steps follow from it"),
        ("sequence_len", "did you mean data.max_seq_len?"),
        ("bf16", "set train.precision to bf16"),
        ("wandb_project", "set the environment variable WANDB_PROJECT"),
    ],
)
def test_keys_of_other_trainers_are_answered(run_file: Path, key: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"unknown key {key}; {remedy}")):
        config.load_run(run_file, [f"{key}=1"])


def test_every_alias_names_a_key_that_exists() -> None:
    known = set(Schema(config.RunConfig).known())
    targets = [target for target in ALIASES.values() if " " not in target]
    assert [t for t in targets if t.replace(".0", "") not in known] == []
    assert not known.intersection(ALIASES)
