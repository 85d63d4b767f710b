"""Writes the locks with hashes and the SBOM, for the versions that the other locks have; `make hashes` runs it.

requirements.hashes.lock    each package of the locks, with the sha256 of every file that the index has of that version
requirements.image.lock     those of them that ftray needs at run time, for the container image: no test or lint tools
requirements.cuda.lock      the CUDA libraries that the index's build of torch needs; a CPU build needs none
sbom.cdx.json               all of these in CycloneDX's format, with licences and hashes

Run it with the packages of the locks installed: licences and dependencies are those of the installed metadata. Names no
index: uv, pip and cyclonedx-py use their own configuration, and addresses are taken out of their output.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / ".ci"))

from licences import canonical, installed, licence_of  # noqa: E402

LOCKS = ("requirements.lock", "requirements-nodeps.lock")
HASHES, IMAGE, CUDA, SBOM = (
    "requirements.hashes.lock",
    "requirements.image.lock",
    "requirements.cuda.lock",
    "sbom.cdx.json",
)
IMAGE_EXTRAS = ("evaluate", "quantize", "tune", "tensorboard", "mlflow", "wandb")
TITLES = {
    HASHES: "All packages of the other locks, with the hashes of their files; torch's are those of its CUDA build.",
    IMAGE: "The packages that ftray needs at run time, with its extras " + ", ".join(IMAGE_EXTRAS) + ".",
    CUDA: "What torch's CUDA build needs besides, on Linux x86-64, with hashes.",
}


def compiled(text: str, *options: str) -> list[str]:
    """A line for each package: `name==version --hash=… --hash=…`, by uv."""
    shape = ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--python-version", "3.11"]
    words = [tool("uv"), "pip", "compile", "--quiet", *shape, *options, "-"]
    out = subprocess.run(words, input=text, capture_output=True, text=True, check=True).stdout
    return re.sub(r" *\\\n *", " ", out).splitlines()


def tool(name: str) -> str:
    """A program of the environment that TOOLS names."""
    return str(Path(sys.argv[1]) / "bin" / name)


def bill(lines: list[str], licences: dict[str, str]) -> dict[str, Any]:
    """The CycloneDX tree of a lock.

    Args:
        lines: `name==version --hash=sha256:…` for each package.
        licences: SPDX expression by canonical name.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as lock:
        lock.write("\n".join(lines))
        lock.flush()
        words = ["requirements", lock.name, "--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible"]
        out = subprocess.run([tool("cyclonedx-py"), *words], capture_output=True, text=True, check=True).stdout
    hashes = {name_of(line): re.findall(r"sha256:([0-9a-f]{64})", line) for line in lines}
    tree: dict[str, Any] = json.loads(out)
    for component in tree["components"]:
        refs = [ref for ref in tree["dependencies"] if ref["ref"] == component["bom-ref"]]
        component["bom-ref"] = component["purl"]
        for ref in refs:
            ref["ref"] = component["purl"]
        component.pop("description", None)
        name = canonical(component["name"])
        if licence := licences.get(name):
            component["licenses"] = [licence_entry(licence)]
        component["hashes"] = [
            {"alg": "SHA-256", "content": value} for value in hashes[name]
        ]  # one per platform's file
    return without_addresses(tree)


def licence_entry(text: str) -> dict[str, Any]:
    """CycloneDX's form of a licence: an SPDX id, an SPDX expression, or a name that SPDX does not know."""
    if text.startswith("LicenseRef-") or text == "BSD":
        return {"license": {"name": text}}
    return {"expression": text} if " " in text else {"license": {"id": text}}


def name_of(line: str) -> str:
    """The canonical name of a lock's line."""
    return canonical(line.split("==", maxsplit=1)[0])


def needed_at_run_time() -> set[str]:
    """Canonical names of ftray's requirements and extras, with all that they require, by the installed metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in IMAGE_EXTRAS for line in project["optional-dependencies"][extra]]
    waiting = [Requirement(line) for line in [*project["dependencies"], *extras]]
    waiting += [Requirement(line) for line in (ROOT / LOCKS[1]).read_text().split()]
    known: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonical(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in known:
                continue
            known.add((name, extra))
            try:
                lines = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            for line in map(Requirement, lines):
                if line.marker is None or line.marker.evaluate({"extra": extra}):
                    waiting.append(line)
    return {name for name, _ in known} | {"setuptools"}  # builds ftray itself in the image


def licences_on_index(lines: list[str]) -> dict[str, str]:
    """Licences of packages that are not installed, by the metadata that the index has."""
    pins = [line.split(" ")[0] for line in lines]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        options = ["--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", report.name]
        subprocess.run([tool("python"), "-m", "pip", "install", *options, *pins], check=True, capture_output=True)
        packages = [item["metadata"] for item in json.load(report)["install"]]
    return {canonical(item["name"]): licence_of(item, item.get("classifier", [])) for item in packages}


def without_addresses(tree: Any) -> Any:
    """The tree less all `externalReferences`."""
    if isinstance(tree, dict):
        return {key: without_addresses(value) for key, value in tree.items() if key != "externalReferences"}
    return [without_addresses(value) for value in tree] if isinstance(tree, list) else tree


def as_lines(tree: dict[str, Any]) -> str:
    """JSON with a line for each component and each dependency, so that a diff shows what changed."""
    parts = []
    for key, value in tree.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(item, sort_keys=True) for item in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n ]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def main() -> None:
    """Writes the four files."""
    pins = "".join((ROOT / name).read_text() for name in LOCKS)
    every = compiled(pins, "--no-deps", "--universal")
    known = {name_of(line) for line in every}
    torch = next(line for line in pins.splitlines() if line.startswith("torch=="))
    needed = compiled(torch, "--constraint", str(ROOT / LOCKS[0]), "--python-platform", "x86_64-manylinux_2_28")
    cuda = [line for line in needed if name_of(line) not in known]
    wanted = needed_at_run_time()
    image = [line for line in every if name_of(line) in wanted]
    for name, lines in ((HASHES, every), (IMAGE, image), (CUDA, cuda)):
        (ROOT / name).write_text("".join(f"{line}\n" for line in [f"# {TITLES[name]} Made by `make hashes`.", *lines]))
        print(f"{name}: {len(lines)} packages")
    licences = installed()
    absent = [line for line in [*every, *cuda] if name_of(line) not in licences]
    tree = bill([*every, *cuda], licences | licences_on_index(absent))
    (ROOT / SBOM).write_text(as_lines(tree))
    print(f"{SBOM}: {len(tree['components'])} components")


if __name__ == "__main__":
    main()
