"""The rules of the house: what stays light, who knows whom, what no file may name; nothing of what the rooms do."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ftray"

HEAVY = {
    "accelerate",
    "bitsandbytes",
    "botocore",
    "datasets",
    "deepspeed",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "ray",
    "s3fs",
    "torch",
    "transformers",
    "vllm",
}

LOCKS = ["requirements.lock", "requirements-nodeps.lock"]

# Spelled in parts, because this file is searched too.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("pypi", "python", "org"),
        ("download", "pytorch", "org"),
        ("conda", "anaconda", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
    ]
]


def files_of_the_repository() -> list[Path]:
    """Every file that git tracks or would add; without git, every file outside environments, caches and runs."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        skip = {".git", ".venv", "runs", "build", "dist", "__pycache__"}
        paths = [path for path in ROOT.rglob("*") if not skip & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.is_file())


def lines_with(pattern: str, paths: list[Path]) -> list[str]:
    """`file:line: text` for each line of these files in which the pattern is found."""
    regex = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if regex.search(line)
    ]


@pytest.mark.parametrize(
    "module", ["ftray.config", "ftray.cli.main", "ftray.storage", "ftray.chat", "ftray.serve.openai"]
)
def test_importing_a_light_module_loads_no_heavy_library(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(json.loads(done.stdout)) == set()


def test_rooms_know_only_the_rooms_below_them() -> None:
    # A process of its own: the linter remembers its settings and is handed the path of this checkout.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_names_a_package_registry() -> None:
    assert lines_with("|".join(map(re.escape, REGISTRY_HOSTS)), files_of_the_repository()) == []


def test_no_code_of_a_model_repository_is_trusted() -> None:
    assert lines_with(r"trust_remote_code\W+True", sorted(PACKAGE.rglob("*.py"))) == []


def test_pickles_are_opened_nowhere() -> None:
    unsafe = r"\b(pickle|dill|joblib)\.loads?\(|weights_only\s*=\s*False|yaml\.(unsafe|full)_load\("
    assert lines_with(unsafe, sorted(PACKAGE.rglob("*.py"))) == []


def test_imports_are_absolute() -> None:
    assert lines_with(r"^\s*from \.", sorted(PACKAGE.rglob("*.py"))) == []


def test_every_room_is_a_package_that_gets_shipped() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


VERSION = r"([0-9]+!)?[0-9][0-9a-z.]*"  # with an epoch where there is one


def pins_of(*locks: str) -> set[tuple[str, str]]:
    """(name as indexes write it, version) of each line of these locks."""
    lines = [line for lock in locks for line in (ROOT / lock).read_text().splitlines() if not line.startswith("#")]
    pins = [line.split(" ")[0].split("==") for line in lines]
    return {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in pins}


def test_the_hashes_and_the_bill_cover_exactly_what_is_locked() -> None:
    locked = pins_of(*LOCKS)
    assert pins_of("requirements.hashes.lock") == locked, "run: make hashes"
    bill = json.loads((ROOT / "sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    locked |= pins_of("requirements.cuda.lock")
    assert {(part["name"], part["version"]) for part in bill["components"]} == locked, "run: make hashes"
    urls = {f"pkg:pypi/{name}@{quote(version)}" for name, version in locked}
    assert {part["purl"] for part in bill["components"]} == urls
    assert bill["metadata"]["component"]["name"] == "ftray"


def test_every_line_of_a_lock_with_hashes_has_one() -> None:
    for lock in ("requirements.hashes.lock", "requirements.image.lock", "requirements.cuda.lock"):
        lines = [line for line in (ROOT / lock).read_text().splitlines() if not line.startswith("#")]
        shape = rf"[a-z0-9-]+=={VERSION}( --hash=sha256:[0-9a-f]{{64}})+"
        assert [line for line in lines if not re.fullmatch(shape, line)] == []
    cuda = pins_of("requirements.cuda.lock")
    assert cuda
    assert [name for name, _ in cuda if not name.startswith(("cuda-", "nvidia-", "triton"))] == []


def test_the_locks_hold_exact_versions() -> None:
    for lock in LOCKS:
        pins = [line for line in (ROOT / lock).read_text().splitlines() if line and not line.startswith("#")]
        assert pins
        assert [pin for pin in pins if not re.fullmatch(rf"[A-Za-z0-9._-]+=={VERSION}", pin)] == []


def import_graph() -> dict[str, set[str]]:
    """Module → modules of ftray that it imports anywhere, those for type checking alone left out."""
    paths = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PACKAGE.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text())
        typing_only = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
            for node in ast.walk(block)
        }
        names: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in paths else node.module for name in below}
        graph[module] = (names & paths.keys()) - {module}
    return graph


def test_no_two_files_import_each_other_even_through_others() -> None:
    graph = import_graph()
    while graph:  # modules that import nothing left can be taken away, until a cycle remains
        leaves = {module for module, imports in graph.items() if not imports & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {module: imports for module, imports in graph.items() if module not in leaves}


def test_no_two_classes_share_a_name() -> None:
    names: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in names.items() if len(where) > 1} == {}
