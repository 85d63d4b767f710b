"""`ftray export` after the merge: fewer bits and what they cost, GGUF by another's converter, the way to a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ftray import storage
from ftray.cli import main
from ftray.errors import ConfigError, RunError
from ftray.model import quantize
from ftray.model.export import CONVERTER, convert_to_gguf, find_converter
from tests import hub, tiny

# How far the loss of the taught model (1.18) may move. Seen: -0.0132, -0.0001, +0.0051.
TOLERANCE = {"nf4": 0.06, "int8": 0.005, "fp8": 0.02}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after 60 steps of the task, so that its loss has something to lose."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    taught, tokenizer = tiny.make_model().train(), tiny.make_tokenizer()
    optimizer = torch.optim.AdamW(taught.parameters(), lr=4e-3)
    texts = [f"{q} {a}" for q, a in tiny._pairs(480, 5)]
    for lo in range(0, len(texts), 8):
        batch = tokenizer(texts[lo : lo + 8], return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        taught(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    taught.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    """Records as documents: the answer is supervised."""
    tokenizer = tiny.make_tokenizer()
    found = []
    for question, answer in tiny._pairs(24, 9):
        head, ids = tokenizer(question)["input_ids"], tokenizer(f"{question} {answer}")["input_ids"]
        found.append([(np.array(ids, np.int32), np.arange(len(ids)) >= len(head))])
    return found


def plain_loss(directory: Path, examples: list[Any]) -> float:
    """Mean cross-entropy of the supervised tokens, by transformers alone, a record at a time."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for ((ids, mask),) in examples:
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor(ids)[None].long()).logits[0, :-1]
        costs = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]).long(), reduction="none")
        total, count = total + float(costs[torch.tensor(mask[1:])].sum()), count + int(mask[1:].sum())
    return total / count


@pytest.mark.parametrize(("kind", "smaller"), [("nf4", 0.62), ("int8", 0.70), ("fp8", 0.71)])
def test_a_quantized_directory_loads_and_its_loss_is_what_was_said(
    model: Path, examples: list[Any], tmp_path: Path, kind: str, smaller: float
) -> None:
    """smaller: of the weights' bytes; half of the tiny model is embeddings and head, which keep their fp32."""
    from transformers import AutoTokenizer

    from ftray.evaluate.quantized import quantize_scored

    pytest.importorskip(quantize.KINDS[kind][0])
    done = quantize_scored(model, tmp_path / kind, kind, "fp32", examples, 128, 2)
    assert done.loss_before is not None
    assert done.loss_after is not None
    assert done.num_trained_tokens == sum(int(mask[1:].sum()) for ((_, mask),) in examples)
    assert done.loss_before < 4, "the model was taught"
    assert done.loss_before == pytest.approx(plain_loss(model, examples), abs=1e-4)
    assert done.loss_after == pytest.approx(plain_loss(tmp_path / kind, examples), abs=2e-3)
    assert 0 < abs(done.loss_after - done.loss_before) < TOLERANCE[kind]
    assert done.bytes_after < smaller * done.bytes_before
    settings = json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == ("compressed-tensors" if kind == "fp8" else "bitsandbytes")
    assert AutoTokenizer.from_pretrained(tmp_path / kind).chat_template == tiny.TEMPLATE
    assert f"{kind}: eval loss {done.loss_before:.4f} → {done.loss_after:.4f}" in str(done)


def test_the_quantized_directory_is_committed_with_its_figures(run_file: Path, examples: list[Any]) -> None:
    """What the Ray task does, in this process."""
    from functools import partial

    from huggingface_hub import ModelCard

    from ftray import config
    from ftray.evaluate.quantized import _quantize
    from ftray.report.model_card import described
    from ftray.train.checkpoint.catalog import best_checkpoint

    run = config.load_run(str(run_file), [])
    run_dir = storage.absolute(run.directory)
    found, target = best_checkpoint(run_dir), storage.join(run_dir, "quantized", "nf4")
    describe = partial(described, run, run_dir)
    done = _quantize(run, found, storage.join(run_dir, "model"), target, "nf4", examples, describe)
    assert storage.verify_directory(target) == []
    manifest = storage.read_manifest(target)
    assert manifest is not None
    assert (manifest["meta"]["step"], quantize.QuantizationResult(**manifest["meta"]["quantized"])) == (3, done)
    card = ModelCard(Path(target, "MODEL_CARD.md").read_text())
    assert f"{done}." in card.text
    assert (card.data.library_name, card.data.tags) == ("transformers", ["ftray", "full", "nf4"])


def test_without_held_out_data_a_cost_is_not_claimed(model: Path, tmp_path: Path) -> None:
    from ftray.evaluate.quantized import quantize_scored

    done = quantize_scored(model, tmp_path / "q", "nf4", "bf16", [], 128, 2)
    assert (done.loss_before, done.loss_after) == (None, None)
    assert "the change of the loss is unknown" in str(done)


def test_a_missing_library_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantize.KINDS, "fp8", ("not_there", "'ftray[quantize]'", ""))
    with pytest.raises(ConfigError, match=r"--quantize fp8 needs not_there, .*: pip install 'ftray\[quant"):
        quantize.check_quantize("fp8")
    quantize.check_quantize("nf4")


CONVERTS = """
import sys, json
from gguf import GGUFWriter
from safetensors.numpy import load_file
source, _, target, _, kind = sys.argv[1:]
assert kind == "f32"
weights = load_file(f"{source}/model.safetensors")
writer = GGUFWriter(target, "llama")
writer.add_block_count(2)
names = {"model.embed_tokens.weight": "token_embd.weight"}
for name, value in weights.items():
    name = names.get(name, name.replace("model.layers.", "blk."))
    if DROPPED not in name:
        writer.add_tensor(name, value)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (CONVERTS.replace("DROPPED", "'blk.1.'"), "lacks layer 1 of the model; use a newer converter"),
        (CONVERTS.replace("DROPPED", "'token_embd'"), "lacks the embeddings of the model"),
        ("import sys; sys.exit('Model LlamaForCausalLM is not supported')", "exit code 1: .*is not supported"),
        ("import sys; open(sys.argv[3], 'w').write('GGUF?')", "is not a GGUF file"),
        ("", "wrote no file .exit code 0: no output"),
    ],
)
def test_what_a_converter_fails_at_is_said(model: Path, tmp_path: Path, script: str, said: str) -> None:
    (tmp_path / "convert.py").write_text(script)
    with pytest.raises(RunError, match=said):
        convert_to_gguf(tmp_path / "convert.py", model, tmp_path / "out.gguf", "fp32")


def test_a_converter_is_found_by_option_by_environment_or_on_the_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv(CONVERTER, raising=False)
    with pytest.raises(ConfigError, match=rf"needs llama.cpp's converter, which is not installed; .* set {CONVERTER}"):
        find_converter(None)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/convert_hf_to_gguf.py"
    script.write_text(CONVERTS.replace("DROPPED", "'?'"))
    script.chmod(0o755)
    assert find_converter(None) == script
    monkeypatch.setenv(CONVERTER, str(tmp_path / "gone.py"))
    with pytest.raises(ConfigError, match=rf"{CONVERTER} .*gone.py is not a file"):
        find_converter(None)
    assert find_converter(str(script)) == script
    assert convert_to_gguf(script, model, tmp_path / "out.gguf", "fp32") == 21, "tensors of the tiny model"


@pytest.fixture
def run_file(model: Path, tmp_path: Path) -> Path:
    """A run `seen`, trained in full to its end at step 3 and exported."""
    tree = {
        "name": "seen",
        "storage": str(tmp_path / "runs"),
        "model": {"base": str(model)},
        "method": {"type": "full"},
        "data": {"train": [{"path": str(tiny.write_records(tmp_path / "data", 10))}]},
        "train": {"precision": "fp32"},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "state.safetensors").write_bytes(b"weights")
    meta = {"progress": {"step": 3, "finished": True}}
    assert storage.commit_directory(staged, f"{tmp_path}/runs/seen/checkpoints/step-000003", meta)
    whole = tmp_path / "whole"
    whole.mkdir()
    for each in model.iterdir():
        (whole / each.name).write_bytes(each.read_bytes())
    (whole / "MODEL_CARD.md").write_text("---\ntags: [ftray]\n---\n# seen\n")
    (whole / "lineage.json").write_text("{}")
    assert storage.commit_directory(whole, f"{tmp_path}/runs/seen/model", {"step": 3})
    return file


def typed(tmp_path: Path, *words: str, **env: str) -> tuple[int, str]:
    """`ftray export` in a process of its own: exit code, and all that it printed and logged."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "ftray.cli.main", "export", *words]
    ended = subprocess.run(command, env=kept | own | env, capture_output=True, text=True, timeout=300)
    logs = "".join(file.read_text() for file in (tmp_path / "cache").rglob("*.log"))
    return ended.returncode, ended.stdout + ended.stderr + logs


def test_the_model_its_card_and_its_lineage_arrive_at_the_hub(model: Path, run_file: Path, tmp_path: Path) -> None:
    with hub.serve_hub() as there:
        env = {"HF_ENDPOINT": there.endpoint, "HF_TOKEN": hub.WRITES}
        before = {"adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b"", "notes.txt": b"kept"}
        there.repos["acme/seen-1.1"] = {"private": False, "files": before, "commits": []}
        code, said = typed(tmp_path, str(run_file), "--push", "hub:acme/seen-1.0", **env)
        assert code == 0, said
        repo = there.repos["acme/seen-1.0"]
        assert typed(tmp_path, str(run_file), "--push", "hub:acme/seen-1.1", **env)[0] == 0
    assert there.repos["acme/seen-1.1"]["private"] is False
    assert there.repos["acme/seen-1.1"]["files"].keys() == repo["files"].keys() | {"notes.txt"}
    assert repo["private"] is True
    assert repo["commits"] == ["seen, fine-tuned with ftray"]
    assert repo["files"]["README.md"].startswith(b"---\ntags: [ftray]")
    assert repo["files"]["model.safetensors"] == (model / "model.safetensors").read_bytes()
    names = {file.name for file in model.iterdir()} | {"README.md", "lineage.json"}
    assert repo["files"].keys() - {".gitattributes"} == names
    assert f"pushed: {there.endpoint}/acme/seen-1.0/commit/1111" in said
    assert hub.WRITES not in said


@pytest.mark.parametrize(
    ("token", "code", "words"),
    [
        ("hf_" + "x" * 34, 2, "refuses the token; create another one, and set HF_TOKEN"),
        (hub.READS, 2, "the token has no write access"),
        ("", 2, "needs a token with write access; set HF_TOKEN, or run: hf auth login"),
    ],
)
def test_a_token_that_will_not_do_is_one_sentence(
    run_file: Path, tmp_path: Path, token: str, code: int, words: str
) -> None:
    with hub.serve_hub() as there:
        found, said = typed(
            tmp_path, str(run_file), "--push", "hub:acme/seen", HF_ENDPOINT=there.endpoint, HF_TOKEN=token
        )
    assert (found, there.repos) == (code, {})
    (sentence,) = [line for line in said.splitlines() if line.startswith("ftray: ")]
    assert words in sentence
    assert "Traceback" not in said
    assert not token or token not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--merged",), "--merged selects what --push uploads"),
        (("--converter", "x.py"), "--converter is for --to gguf"),
    ],
)
def test_an_option_without_the_one_that_it_is_for_is_refused(
    run_file: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["export", str(run_file), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_hub_that_is_not_there_fails_the_command(run_file: Path, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": hub.WRITES}
    code, said = typed(tmp_path, str(run_file), "--push", "hub:acme/seen", **env)
    assert (code, said.count("\n")) == (1, 1), said
    assert "http://127.0.0.1:9 cannot be reached (" in said
    assert hub.WRITES not in said


@pytest.mark.parametrize("address", ["acme/seen", "hub:seen", "hub:acme/se en", "hub:acme/a/b", "hub:-/x", "s3://a/b"])
def test_a_name_that_is_none_of_the_hubs(run_file: Path, capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert main.main(["export", str(run_file), "--push", address]) == 2
    assert capsys.readouterr().err == f"ftray: --push {address} is not a hub repository; write hub:org/name\n"
