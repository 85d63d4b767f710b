"""Hostile entries of the registry of published adapters, written by whoever may write below `published/`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from bench.hostile.adapters import CONFIG, SETTINGS, WEIGHTS, good_header, safetensors
from bench.hostile.case import Case, Place, cases_of

REGISTRY = "published/small"
META = {"base": "org/small", "revision": None, "run": "r", "step": 3, "rank": 2}


def serve_registry() -> None:
    """Reads the registry as a replica does; the good adapter must be served. Raises ModelError for the bad one."""
    from ftray.errors import ModelError
    from ftray.serve.adapter_cache import AdapterCache, ServedModels
    from ftray.serve.registry_schema import Rejected

    rejected: list[Rejected] = []

    async def look() -> list[str]:
        served = ServedModels("small", {}, os.path.abspath(REGISTRY), "org/small", None, 8)  # noqa: PTH100
        catalog = AdapterCache(None, served, rejected.append)  # type: ignore[arg-type] # nothing is loaded
        await catalog.start()
        for name in catalog.model_ids():
            catalog.lineage(name), catalog.reference(name)
        await catalog.stop()
        return catalog.model_ids()

    served = asyncio.run(look())
    if "small:good" not in served:
        raise RuntimeError(f"the good adapter is not served, but {served}")
    if rejected:
        raise ModelError(str(rejected[0]))


def entry(
    place: Place, name: str, change: Callable[[dict[str, Any]], object] | None = None, data: bytes | None = None
) -> None:
    """Writes an entry with a right checksum; change: what is wrong in it; data: the whole manifest."""
    config, weights = json.dumps(SETTINGS).encode(), safetensors(good_header())
    sums = {CONFIG: hashlib.sha256(config), WEIGHTS: hashlib.sha256(weights)}
    sizes = {CONFIG: len(config), WEIGHTS: len(weights)}
    files = {file: {"size": sizes[file], "sha256": sum_.hexdigest()} for file, sum_ in sums.items()}
    content = hashlib.sha256(sums[CONFIG].digest() + sums[WEIGHTS].digest()).hexdigest()[:12]
    where = f"{REGISTRY}/{name}/0001-{content}"
    tree: dict[str, Any] = {"files": files, "meta": dict(META)}
    if change is not None:
        change(tree)
    text = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    place.write(f"{where}/{CONFIG}", config)
    place.write(f"{where}/{WEIGHTS}", weights)
    place.write(f"{where}/manifest.json", json.dumps({**tree, "sha256": text}) if data is None else data)


def meta(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree["meta"].update(changes)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "lineage-number": meta(lineage=5),
    "lineage-terminal-escapes": meta(lineage="\x1b[2J\x1b]0;x\x07"),
    "reference-list": meta(reference=[1]),
    "reference-of-text": meta(reference={"prompt_tokens": ["x"] * 9}),
    "reference-without-end": meta(reference={"prompt_tokens": [1] * 20_000}),
    "scripts-huge": meta(reference={"scripts": {"Latin": 1e300}}),
    "scripts-null": meta(reference={"scripts": {"Latin": None}}),
    "base-list": meta(base=["org/small"]),
    "base-missing": lambda tree: tree["meta"].pop("base"),
    "base-other": meta(base="org/other"),
    "base-of-100-kb": meta(base="x" * 100_000),
    "step-text": meta(step="3"),
    "step-huge": meta(step=10**300),
    "rank-huge": meta(rank=10**9),
    "owner-tree": meta(owner={"a": 1}),
    "signature-number": meta(signature=5),
    "meta-null": lambda tree: tree.update(meta=None),
    "meta-missing": lambda tree: tree.pop("meta"),
    "files-list": lambda tree: tree.update(files=[]),
    "files-empty": lambda tree: tree.update(files={}),
    "files-outside": lambda tree: tree["files"].update({"../../../../outside/secret.txt": {"size": 1, "sha256": "0" * 64}}),
    "sha256-number": lambda tree: tree["files"][CONFIG].update(sha256=7),
    "sha256-of-others": lambda tree: tree["files"][CONFIG].update(sha256="0" * 64),
    "size-of-exabytes": lambda tree: tree["files"][CONFIG].update(size=2**60),
    "more-keys": lambda tree: tree.update(more=1),
}  # fmt: skip
WHOLE: dict[str, bytes] = {
    "empty": b"",
    "no-json": b"{",
    "null": b"null",
    "list": b"[]",
    "nested": b'{"meta": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "nested-objects": b'{"meta": ' + b'{"a": ' * 500 + b"1" + b"}" * 501,
    "of-100-mb": b'{"meta": "' + b"x" * 100_000_000 + b'"}',
    "nan": b'{"files": {}, "meta": {"step": NaN}, "sha256": ""}',
    "huge-integer": b'{"files": {}, "sha256": "", "meta": ' + b"9" * 200_000 + b"}",
    "bad-utf8": b'{"files": "\xff\xfe"}',
    "half-a-pair": b'{"files": {}, "meta": {"base": "\\ud800"}, "sha256": ""}',
    "twice": b'{"files": {}, "files": {}, "meta": {}, "sha256": ""}',
    "pickle": b"\x80\x04cposix\nsystem\n",
}


def _links(place: Place) -> None:
    place.write(f"{REGISTRY}/.keep", "")
    (place.directory / REGISTRY / "linked").symlink_to("/usr")


def _pipe(place: Place) -> None:
    entry(place, "evil")
    (manifest,) = (place.directory / REGISTRY / "evil").glob("*/manifest.json")
    manifest.unlink()
    os.mkfifo(manifest)


def _many(place: Place) -> None:
    for number in range(3000):
        place.write(f"{REGISTRY}/evil{number % 30}/{number:04d}-0123456789ab/manifest.json", "{")


@cases_of("manifests")
def manifests() -> Iterator[Case]:
    """Cases of one bad entry beside a good one."""

    def case(name: str, prepare: Callable[[Place], object], harmless: bool = False) -> Case:
        def both(place: Place) -> None:
            entry(place, "good")
            prepare(place)

        return Case(name, both, serve_registry, harmless=harmless)

    for name, change in CHANGES.items():
        yield case(name, lambda place, change=change: entry(place, "evil", change))
    for name, data in WHOLE.items():
        yield case(name, lambda place, data=data: entry(place, "evil", data=data))
    yield case("a-link-to-everything", _links, harmless=True)
    yield case("a-pipe", _pipe)
    yield case("thousands-of-versions", _many)
