"""An endpoint that could not start is refused while nothing has been trained: the engine missing, or an adapter it can't hold."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from ftray.cli import main

LORA = {"method": {"type": "lora", "rank": 8}}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tree = {"name": "r", "model": {"base": "org/base"}, "data": {"train": [{"path": "data"}]}, **LORA}
    Path("run.yaml").write_text(yaml.safe_dump(tree | {"serve": {"engine": "vllm"}}))
    return Path("run.yaml")


def with_vllm(monkeypatch: pytest.MonkeyPatch, *, is_there: bool) -> None:
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module if is_there else None)


@pytest.mark.parametrize(
    ("is_there", "words", "fragments"),
    [
        (True, (), ()),
        (True, ("method.rank=64",), ()),
        (True, ("method.rank=65",), ("up to rank 64", "method.rank is 65", "serve.max_adapters: 0")),
        (True, ("method.rank=65", "serve.max_adapters=0"), ()),
        (True, ("method.dora=true",), ("method.dora", "serve.max_adapters: 0")),
        (True, ("method.dora=true", "serve.engine=transformers"), ()),
        (True, ("method.type=full", "method.rank=65"), ()),
        (False, (), ("serve.engine is vllm", "not installed", "pip install 'ftray[vllm]'")),
        (False, ("serve.engine=transformers",), ()),
        (False, ("method.type=prompt-tuning",), ()),  # never served
        (False, ("storage=s3://bucket/runs",), ()),  # an image's, as far as can be told
        (False, ("storage=s3://bucket/runs", "method.dora=true"), ("method.dora",)),
    ],
)
def test_check_tells_what_an_engine_can_not_do(
    run_file: Path,
    is_there: bool,
    words: tuple[str, ...],
    fragments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_vllm(monkeypatch, is_there=is_there)
    code = main.main(["check", "--fast", str(run_file), *words])
    err = capsys.readouterr().err
    assert code == (2 if fragments else 0), err
    assert all(fragment in err for fragment in fragments), err
    assert err.count("\n") == bool(fragments)


@pytest.mark.parametrize(("ranks", "rank", "code"), [([16, 128], 16, 2), ([16, 64], 128, 0)])
def test_a_sweep_is_asked_by_what_it_will_train(
    run_file: Path,
    ranks: list[int],
    rank: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_vllm(monkeypatch, is_there=True)
    tree = yaml.safe_load(run_file.read_text())
    tree["method"]["rank"], tree["data"]["eval"] = rank, {"fraction": 0.1}
    tree["tune"] = {"space": {"method.rank": {"type": "choice", "values": ranks}}, "num_trials": 2}
    run_file.write_text(yaml.safe_dump(tree))
    assert main.main(["check", "--fast", str(run_file)]) == code
    assert ("method.rank is 128" in capsys.readouterr().err) == (code == 2)


def test_where_a_cluster_is_asked_it_may_have_what_this_machine_has_not(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_vllm(monkeypatch, is_there=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert main.main(["check", "--fast", str(run_file)]) == 0
