"""`ftray publish` and `ftray serve --config` as typed, on a run made by hand: what must hold before, what is said."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray import storage
from ftray.cli import main
from tests.unit.test_adapter_cache import write_model


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run `polite`, trained to its end at step 3 and exported."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (base / name).write_text("{}")
    tree = {
        "name": "polite",
        "storage": "runs",
        "model": {"base": "base"},
        "data": {"train": [{"path": "data"}]},
        "train": {"precision": "fp32"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(tree))
    checkpoint(tmp_path, 3, finished=True)
    write_model(tmp_path / "runs/polite/model", "polite")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "runs/polite/model/merged" / name).write_text("{}")
    return "run.yaml"


def checkpoint(root: Path, step: int, **progress: Any) -> None:
    staged = root / "staged"
    staged.mkdir(exist_ok=True)
    (staged / "state.safetensors").write_bytes(b"weights")
    meta = {"progress": {"step": step, **progress}}
    assert storage.commit_directory(staged, f"{root}/runs/polite/checkpoints/step-{step:06d}", meta)


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main.main(list(words))
    out, err = capsys.readouterr()
    return code, out + err


def gates(root: Path, *passed: bool, step: int = 3) -> None:
    tree = {"step": step, "gates": [{"name": f"gate-{i}", "passed": one} for i, one in enumerate(passed)]}
    storage.write_bytes(str(root / "runs/polite/evaluate/results.json"), json.dumps(tree).encode())


def test_a_complete_run_is_published_once_and_taken_away(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = typed(capsys, "publish", run_file)
    assert code == 0
    assert said.startswith("published base:polite, version 0001-")
    assert typed(capsys, "publish", run_file)[1].startswith("base:polite is already published: ")
    assert typed(capsys, "publish", run_file, "--name", "other")[1].startswith("published base:other, version 0001-")
    (manifest,) = (tmp_path / "runs/published/base/polite").glob("*/manifest.json")
    meta = json.loads(manifest.read_text())["meta"]
    assert {
        "base": str(tmp_path / "base"),
        "revision": None,
        "run": "polite",
        "step": 3,
        "rank": 2,
    }.items() <= meta.items()
    code, said = typed(capsys, "publish", run_file, "--remove")
    assert (code, said) == (0, "base:polite is no longer published (1 version removed)\n")
    code, said = typed(capsys, "publish", run_file, "--remove")
    assert code == 2
    assert "published adapters: other" in said


def test_gates_decide(run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates(tmp_path, True, False)
    code, said = typed(capsys, "publish", run_file)
    assert code == 3
    assert "the gate gate-1 refused the model" in said
    gates(tmp_path, True, True, step=2)
    code, said = typed(capsys, "publish", run_file)
    assert (code, "the gates were evaluated for step 2, not for step 3" in said) == (2, True)
    assert not (tmp_path / "runs/published").exists()
    gates(tmp_path, True, True)
    assert typed(capsys, "publish", run_file)[0] == 0


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("--name", "../x"), ("cannot be an adapter's name",)),
        (("method.type=full",), ("method.type full", "use lora")),
        (("name=nowhere",), ("'nowhere' is not fully trained", "ftray train run.yaml")),
    ],
)
def test_what_can_not_be_published_is_told(
    run_file: str, words: tuple[str, ...], fragments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = typed(capsys, "publish", run_file, *words)
    assert code == 2
    assert all(fragment in said for fragment in fragments), said


def test_an_export_of_another_step_is_not_published(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, 4, finished=True)
    code, said = typed(capsys, "publish", run_file)
    assert (code, "does not hold the model of step 4" in said, "ftray export run.yaml" in said) == (2, True, True)


def test_the_serve_config_builds_the_same_endpoint_and_holds_no_key(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTRAY_API_KEY", "a-secret-key")
    reference = {"prompt_tokens": list(range(9)), "scripts": {"Latin": 1.0}}
    storage.write_bytes(str(tmp_path / "runs/polite/data/reference.json"), json.dumps(reference).encode())
    (tmp_path / "runs/polite/model/manifest.json").unlink()
    model = str(tmp_path / "runs/polite/model")
    assert storage.commit_directory(Path(model), model, {"step": 3, "lineage": "0123456789abcdef"})
    code, said = typed(capsys, "serve", run_file, "--config", "serve.host=0.0.0.0", "serve.max_adapters=3")
    assert code == 0
    assert "a-secret-key" not in said
    tree = yaml.safe_load(said)
    (application,) = tree["applications"]
    assert tree["http_options"] == {"host": "0.0.0.0", "port": 8000, "request_timeout_s": 1200.0}
    from ray.serve.schema import ServeDeploySchema

    from ftray.serve import app
    from ftray.serve.auth import hash_key

    ServeDeploySchema.model_validate(tree)
    module, function = application["import_path"].split(":")
    assert (module, function) == (app.__name__, "build")
    built = app.build(application["args"])
    (settings,) = built._bound_deployment.init_args
    assert settings.key_hashes == (hash_key("a-secret-key"),)
    assert settings.served.model_id == "base"
    assert dict(settings.served.adapters) == {"polite": str(tmp_path / "runs/polite/model")}
    assert settings.served.registry == str(tmp_path / "runs/published/base")
    assert settings.served.lineages == {"polite": "0123456789abcdef"}
    assert settings.served.references == {"polite": reference}
    assert (settings.served.max_adapters, settings.dtype, settings.model_dir) == (3, "float32", str(tmp_path / "base"))


def test_a_serve_config_for_elsewhere_needs_no_engine_here(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, said = typed(capsys, "serve", run_file, "--config", "serve.engine=vllm")
    assert (code, yaml.safe_load(said)["applications"][0]["args"]["serve"]["engine"]) == (0, "vllm")
    code, said = typed(capsys, "serve", run_file, "--config", "serve.engine=vllm", "method.rank=128")
    assert (code, "up to rank 64" in said) == (2, True)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("nowhere",), "nowhere is neither a run file"),
        (("run.yaml",), "two served models are called polite"),
        (("runs/polite/model", "serve.max_adapters=0"), "serve.max_adapters is 0"),
        (
            ("serve.ab={polite: 0.5, base:x: 0.5}",),
            "serve.ab names base:x, which is not served; use one of base, polite",
        ),
        (("serve.canary.model=x",), "canary.model (x) must be one of at least two models in ab"),
        (("serve.ab={default: 1}",), "ab can't contain 'default'"),
    ],
)
def test_what_can_not_be_served_together_is_told(
    run_file: str, words: tuple[str, ...], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = typed(capsys, "serve", run_file, *words, "--config")
    assert code == 2
    assert fragment in said


def test_more_adapters_of_the_same_base_are_served_beside_the_run(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "rude", "rude")
    code, said = typed(capsys, "serve", run_file, "rude", "--config")
    assert code == 0
    adapters = yaml.safe_load(said)["applications"][0]["args"]["served"]["adapters"]
    assert list(adapters.items()) == [("polite", f"{tmp_path}/runs/polite/model"), ("rude", f"{tmp_path}/rude")]
