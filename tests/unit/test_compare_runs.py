"""Two runs side by side: what differs between them is named, and what is the same is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftray.cli import main
from ftray.report.compare_runs import differences
from ftray.report.run_report import read_report_data
from tests.runs import BEGAN_S, line, with_two_kills, write_evaluation, write_run


def test_settings_data_and_figures_of_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, run_dir = with_two_kills(tmp_path)
    lines = [line(n, 2.0, BEGAN_S + n, tokens_per_s=500.0) for n in range(20)]
    changed = {"train": {"global_batch_size": 4, "max_steps": 20, "learning_rate": 1e-3}}
    other, other_dir = write_run(tmp_path, lines, name="other", **changed)
    write_evaluation(other, other_dir)
    assert main.main(["runs", "compare", str(run_dir), str(other_dir)]) == 0
    out = capsys.readouterr().out
    assert "settings   train.learning_rate (0.0002 → 0.001); train.max_steps (40 → 20)\n" in out
    assert "data       the same\n" in out
    rows = {row[:16].strip(): row[16:].split() for row in out.splitlines() if row.startswith(("s", "t", "g", "f", "b"))}
    assert rows["tokens"] == ["40,000", "20,000"]
    assert rows["training loss"] == ["0.4058", "2.0000"]
    assert rows["tokens/s"] == ["1,000", "500"]
    assert rows["goodput"] == ["37%", "–"]
    assert "tuned: ROUGE-L" in out


def test_files_and_packages_that_differ_are_named(tmp_path: Path) -> None:
    known = []
    for name, rows, torch in (("a", "x", "2.13"), ("b", "y", "2.14")):
        run, run_dir = write_run(tmp_path, [line(0, 1.0, BEGAN_S)], name=name)
        file = run_dir / "run.json"
        tree = json.loads(file.read_text())
        where = {
            "python": "3",
            "cpu": "c",
            "image": None,
            "code": {"commit": "k", "sha256": "s"},
            "packages": {"torch": torch},
        }
        files = [{"part": "train", "uri": uri, "rows": r} for uri, r in (("/d/1", rows), (f"/d/{name}", "z"))]
        tree["lineage"] = {
            "id": name,
            "config_hash": run.config_hash,
            "base": {"name": "org/base", "files": {}},
            "data": {"hash": rows, "files": files},
            "environment": where,
        }
        file.write_text(json.dumps(tree))
        found = read_report_data(run, str(run_dir))
        assert found.newest is not None
        found.newest.meta["data_hash"] = rows
        known.append(found)
    text = "\n".join(differences(*known))
    assert "settings   the same" in text
    assert "data       /d/1 gives other packed sequences; only a has /d/a; only b has /d/b" in text
    assert "packages   in b, torch is 2.14 instead of 2.13" in text


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["runs", "compare", str(tmp_path), str(tmp_path)]) == 2
    assert "neither a run file" in capsys.readouterr().err
