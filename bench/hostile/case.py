"""A hostile case, and the registry of generators: one function for each kind of input."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules that register kinds. One that is missing is left out, so that kinds can be added on their own.
MODULES = ("data", "models", "run_files", "adapters", "manifests", "requests")


@dataclass(frozen=True)
class Place:
    """Where one case runs.

    directory: the run directory, which is the process's working directory and the only place that may be written to.
    outside: a sibling directory with files that nobody may read from or change. canary: a file in there that only a
    payload creates; a case passes for code execution where it exists afterwards.
    """

    directory: Path
    outside: Path

    @property
    def canary(self) -> Path:
        """The file that a payload creates."""
        return self.outside / "canary"

    def write(self, name: str, content: bytes | str) -> Path:
        """Writes a file below the run directory, with the directories above it."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path


@dataclass(frozen=True)
class Case:
    """One hostile input.

    name: unique within its kind. prepare: writes the files. command: the words after `ftray`, or a function at a
    module's top level that processes the files with the run directory as working directory; it may raise an FtrayError,
    which is shown as the command line shows it. harmless: the input does no harm, so that exit code 0 is right, too.
    uses_ray: the command starts Ray, which takes several seconds.
    """

    name: str
    prepare: Callable[[Place], object]
    command: tuple[str, ...] | Callable[[], object]
    harmless: bool = False
    uses_ray: bool = False
    kind: str = ""

    @property
    def full_name(self) -> str:
        """`kind/name`."""
        return f"{self.kind}/{self.name}"


Generator = Callable[[], Iterable[Case]]
_generators: dict[str, Generator] = {}


def cases_of(kind: str) -> Callable[[Generator], Generator]:
    """Decorator: registers a function that yields the cases of a kind."""

    def register(generator: Generator) -> Generator:
        _generators[kind] = generator
        return generator

    return register


def all_cases(kinds: Iterable[str] = ()) -> list[Case]:
    """Every case of every registered kind (or of the named kinds), in a fixed order.

    Raises:
        ValueError: a kind has two cases of one name, or there is no such kind.
    """
    for module in MODULES:
        try:
            importlib.import_module(f"bench.hostile.{module}")
        except ModuleNotFoundError as err:
            if err.name != f"bench.hostile.{module}":
                raise
    wanted = tuple(kinds) or tuple(_generators)
    if unknown := set(wanted) - set(_generators):
        raise ValueError(f"there is no kind {sorted(unknown)[0]}; the kinds are {', '.join(_generators)}")
    return list(_named(wanted))


def _named(kinds: Iterable[str]) -> Iterator[Case]:
    names: set[str] = set()
    for kind in kinds:
        for case in _generators[kind]():
            named = Case(case.name, case.prepare, case.command, case.harmless, case.uses_ray, kind)
            if named.full_name in names:
                raise ValueError(f"there are two cases {named.full_name}")
            names.add(named.full_name)
            yield named
