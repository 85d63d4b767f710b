"""Writes the hashes of the locks' packages, and a bill of them, beside the locks; `make hashes` runs it, with its tools.

requirements.hashes.lock    each package of the locks, with the sha256 of every file that the index has of that version
requirements.cuda.lock      the CUDA libraries that the index's build of torch needs, likewise; a CPU build needs none
sbom.cdx.json               the packages of requirements.hashes.lock in CycloneDX's format

Names no index: uv and cyclonedx-py use what they are set up for, and addresses are taken out of what they write.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-nodeps.lock")
HASHES, CUDA, SBOM = "requirements.hashes.lock", "requirements.cuda.lock", "sbom.cdx.json"
TITLES = {
    HASHES: "All packages of the other locks, with the hashes of their files; torch's are those of its CUDA build.",
    CUDA: "What torch's CUDA build needs besides, on Linux x86-64, with hashes.",
}


def compiled(text: str, *options: str) -> list[str]:
    """A line for each package: `name==version --hash=… --hash=…`, by uv."""
    shape = ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--python-version", "3.11"]
    words = [tool("uv"), "pip", "compile", "--quiet", *shape, *options, "-"]
    out = subprocess.run(words, input=text, capture_output=True, text=True, check=True).stdout
    return re.sub(r" *\\\n *", " ", out).splitlines()


def tool(name: str) -> str:
    """A program of this Python's environment."""
    return str(Path(sys.executable).with_name(name))


def bill(lock: Path) -> dict[str, Any]:
    """The CycloneDX tree of a lock: name, version and purl of each package; hashes are in the lock itself."""
    words = ["requirements", str(lock), "--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible"]
    out = subprocess.run([tool("cyclonedx-py"), *words], capture_output=True, text=True, check=True).stdout
    tree: dict[str, Any] = json.loads(out)
    for component in tree["components"]:
        refs = [ref for ref in tree["dependencies"] if ref["ref"] == component["bom-ref"]]
        component["bom-ref"] = component["purl"]
        for ref in refs:
            ref["ref"] = component["purl"]
        component.pop("description", None)
    return without_addresses(tree)


def without_addresses(tree: Any) -> Any:
    """The tree less all `externalReferences`."""
    if isinstance(tree, dict):
        return {key: without_addresses(value) for key, value in tree.items() if key != "externalReferences"}
    return [without_addresses(value) for value in tree] if isinstance(tree, list) else tree


def main() -> None:
    """Writes the three files."""
    pins = "".join((ROOT / name).read_text() for name in LOCKS)
    every = compiled(pins, "--no-deps", "--universal")
    known = {line.split("==")[0] for line in every}
    torch = next(line for line in pins.splitlines() if line.startswith("torch=="))
    needed = compiled(torch, "--constraint", str(ROOT / LOCKS[0]), "--python-platform", "x86_64-manylinux_2_28")
    cuda = [line for line in needed if line.split("==")[0] not in known]
    for name, lines in ((HASHES, every), (CUDA, cuda)):
        (ROOT / name).write_text("".join(f"{line}\n" for line in [f"# {TITLES[name]} Made by `make hashes`.", *lines]))
        print(f"{name}: {len(lines)} packages")
    tree = bill(ROOT / HASHES)
    (ROOT / SBOM).write_text(json.dumps(tree, indent=1) + "\n")
    print(f"{SBOM}: {len(tree['components'])} components")


if __name__ == "__main__":
    main()
