"""Hostile run files: `ftray check` must answer them at once."""

from __future__ import annotations

from collections.abc import Iterator

from bench.hostile.case import Case, Place, cases_of

GOOD = "name: a\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {max_steps: 1}\n"


def bomb(levels: int = 9, width: int = 9) -> str:
    """Aliases of aliases: width ** levels values when written out."""
    lines = [f"z0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"z{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def _pairs_of_aliases() -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    return "\n".join(lines + [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 60)])


def _merges() -> str:
    lines = ["a0: &a0 {x: 1}"]
    return "\n".join(lines + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)])


FILES: dict[str, str | bytes] = {
    "bomb-at-name": bomb() + GOOD.replace("name: a", "name: *a8"),
    "bomb-at-storage": bomb() + GOOD + "storage: *a8\n",
    "bomb-at-data": bomb() + GOOD.replace("path: c", "path: *a8"),
    "bomb-at-base": bomb() + GOOD.replace("base: b", "base: *a8"),
    "bomb-at-unknown-key": bomb() + GOOD,
    "bomb-as-key": bomb() + "? *a8\n: 1\n",
    "bomb-of-mappings": _pairs_of_aliases(),
    "bomb-of-merges": _merges(),
    "bomb-of-text": "t: &t " + "x" * 40_000 + "\nl: [" + ", ".join(["*t"] * 5000) + "]\n",
    "holds-itself": GOOD + "storage: &s [*s]\n",
    "python-object": GOOD + "storage: !!python/object/apply:os.system ['touch ../outside/canary']\n",
    "python-name": GOOD + "storage: !!python/name:os.system\n",
    "python-module": GOOD + "storage: !!python/object/new:os.system [touch ../outside/canary]\n",
    "deep-lists": "[" * 50_000,
    "deep-mappings": "{a: " * 50_000,
    "deep-blocks": "".join(" " * n + "a:\n" for n in range(600)),
    "deep-value": GOOD + "storage: " + "[" * 400 + "]" * 400 + "\n",
    "large-file": "# " + "x" * 50_000_000,
    "many-keys": "\n".join(f"k{n}: 1" for n in range(6_000)),
    "many-documents": "---\n" * 50_000,
    "many-anchors": "\n".join(f"a{n}: &a{n} x" for n in range(4_000)),
    "long-key": "k" * 200_000 + ": 1\n",
    "hex-number": GOOD.replace("max_steps: 1", "max_steps: 0x" + "f" * 100_000),
    "base-60-number": GOOD.replace("max_steps: 1", "max_steps: " + "1:" * 50_000 + "1"),
    "base-60-float": GOOD.replace("max_steps: 1", "max_steps: " + "1:" * 50_000 + "1.5"),
    "long-number": GOOD.replace("max_steps: 1", "max_steps: " + "9" * 100_000),
    "nan": GOOD + "method: {type: lora, rank: .nan}\n",
    "infinity": GOOD.replace("max_steps: 1", "max_steps: .inf"),
    "negative": GOOD.replace("max_steps: 1", "max_steps: -1"),
    "wrong-bool": GOOD + "storage: !!bool maybe\n",
    "wrong-timestamp": GOOD + "storage: 2024-13-45\n",
    "empty-int": GOOD + "storage: !!int ''\n",
    "binary-value": GOOD + "storage: !!binary x\n",
    "set-value": GOOD + "storage: !!set {a, b}\n",
    "list-key": GOOD + "? [a, b]\n: c\n",
    "null-key": GOOD + "~: c\n",
    "not-utf8": b"name: \xff\xfe\n",
    "nul-byte": b"name: \x00\n",
    "utf16": GOOD.encode("utf-16"),
    "empty": "",
    "only-comment": "# nothing\n",
    "only-text": "hello",
    "only-list": "[1, 2]",
    "tabs": "name:\n\t- a\n",
    "unclosed-quote": "name: 'a\n",
    "terminal-escape": '"na\\e]0;owned\\ame": a\n' + GOOD,
    "newline-in-name": GOOD.replace("name: a", 'name: "a\\nb"'),
    "name-is-path": GOOD.replace("name: a", "name: ../../outside/run"),
    "name-is-absolute": GOOD.replace("name: a", "name: /etc/passwd"),
    "secret-in-file": GOOD + "storage: s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY@b/c\n",
    "regex-bait": GOOD.replace("name: a", "name: " + "a" * 50_000 + "!"),
    "model-code": GOOD.replace("base: b", "base: b, trust_remote_code: maybe"),
    "key-twice": GOOD + "name: b\n",
}


@cases_of("run files")
def run_file_cases() -> Iterator[Case]:
    """One for each file, processed by `ftray check`."""

    def prepare(content: str | bytes) -> object:
        return lambda place: place.write("run.yaml", content)

    for name, content in FILES.items():
        yield Case(name, prepare(content), ("check", "run.yaml"))  # type: ignore[arg-type]
    overrides = {
        "override-bomb": "name=" + bomb(),
        "override-object": "name=!!python/name:os.system",
        "override-deep": "a.b=" + "[" * 9000,
    }
    for name, override in overrides.items():
        yield Case(name, prepare(GOOD), ("check", "run.yaml", override))  # type: ignore[arg-type]
    yield Case(
        "endless-device", lambda place: (place.directory / "run.yaml").symlink_to("/dev/zero"), ("check", "run.yaml")
    )
    yield Case("a-directory", lambda place: (place.directory / "run.yaml").mkdir(), ("check", "run.yaml"))
    yield Case("hole-of-64-gib", _hole, ("check", "run.yaml"))


def _hole(place: Place) -> None:
    with (place.directory / "run.yaml").open("wb") as file:
        file.truncate(1 << 36)
