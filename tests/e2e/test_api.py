"""`import ftray`: a run from Python, as in a notebook."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ftray
from ftray.errors import ConfigError
from tests import tiny
from tests.e2e.command import SETTINGS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ftray.Run:
    """A tiny run of six steps."""
    root = tmp_path_factory.mktemp("api")
    tiny.write_tiny_model(root / "model")
    tiny.write_records(root / "data", 40)
    tree = {
        **SETTINGS,
        "storage": str(root / "runs"),
        "model": {"base": str(root / "model")},
        "data": {**SETTINGS["data"], "train": [{"path": str(root / "data")}], "eval": {"fraction": 0.2}},  # type: ignore[dict-item]
        "scale": {"num_workers": 1},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ftray.Run.train(str(path), "train.max_steps=6")


@pytest.mark.long
def test_a_run_is_trained_compared_exported_and_asked(trained: ftray.Run) -> None:
    assert list(trained.metrics.index) == list(range(6))
    assert trained.metrics["loss"].iloc[-1] < trained.metrics["loss"].iloc[0]
    assert trained.checkpoints[0].step == 6
    assert trained.comparison is None
    with pytest.raises(ConfigError, match=r"has no exported model; call export\(\) first"):
        trained.generate("hello")
    comparison = trained.evaluate()
    assert trained.comparison == comparison
    assert comparison.tuned.loss < comparison.base.loss
    assert Path(trained.export(), "config.json").exists()
    answer = trained.generate("hello", max_tokens=5)
    assert answer == trained.chat([{"role": "user", "content": "hello"}], max_tokens=5)
    again = ftray.Run.train(trained.config)  # complete: nothing is trained
    assert again.checkpoints == trained.checkpoints
    assert repr(again) == repr(trained)


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a run file"):
        ftray.Run(str(tmp_path))
    with pytest.raises(ConfigError, match="unknown key"):
        ftray.load_config("jobs/quickstart.yaml", "train.lr=1")


def test_a_plan_needs_no_run_and_overrides_change_it() -> None:
    config = ftray.load_config("jobs/lora-8b.yaml")
    small, large = (ftray.plan(config, f"method.rank={rank}", card="H100") for rank in (16, 64))
    assert large.num_trained == 4 * small.num_trained
    assert small.choice.card == "H100"


def test_importing_ftray_imports_nothing_heavy() -> None:
    code = "import sys, ftray; assert ftray.__version__; assert not {'torch', 'ray', 'pandas', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(dir(ftray)) == {"Run", "__version__", "load_config", "plan"}
