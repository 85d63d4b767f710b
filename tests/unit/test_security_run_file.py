"""What a hostile author of a run file can do: nothing but have it refused, at once and in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray import config
from ftray.cli import main
from ftray.config.loader import MAX_YAML_CHARS, MAX_YAML_SIZE, apply_override, parse_yaml
from ftray.errors import ConfigError, FtrayError
from ftray.tune.space import as_word

GOOD = "name: a\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {max_steps: 1}\n"
KEYS = ("name", "storage", "model", "model.base", "data", "data.train", "train.max_steps", "tune", "tags", "unknown")


def bomb(levels: int = 9, width: int = 9, scalar: str = "x") -> str:
    """Lists of aliases of lists of aliases: width ** levels values when written out."""
    lines = [f"z0: &a0 [{', '.join([scalar] * width)}]"]
    lines += [f"z{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def refuse(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load_run(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_aliases_of_aliases_are_refused_at_any_key(tmp_path: Path, key: str) -> None:
    value = "*a8"
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    text = bomb() + value[1:-1] + "\n"
    assert "after expanding its aliases this has more than 100000 values" in refuse(tmp_path / "run.yaml", text)


BOMBS = {
    "mappings": "a: &a {x: 1, y: 2}\n"
    + "".join(f"b{n}: &b{n} {{x: *{'a' if n == 0 else f'b{n - 1}'}, y: *{'a' if n == 0 else f'b{n - 1}'}}}\n" for n in range(40)),
    "merges": "a: &a0 {x: 1}\n"
    + "".join(f"m{n}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(9)),
    "keys": bomb() + "? *a8\n: 1\n",
    "long text": "t: &t " + "x" * 40_000 + "\nl: [" + ", ".join(["*t"] * 1000) + "]\n",
    "itself": "a: &a [1, *a]\n",
    "itself below": "a: &a {b: {c: [*a]}}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_of_all_shapes_are_refused(tmp_path: Path, name: str) -> None:
    said = refuse(tmp_path / "run.yaml", BOMBS[name])
    assert "after expanding its aliases" in said or "an alias refers to a node that contains it" in said
    with pytest.raises(ConfigError, match="override name, line"):
        apply_override({}, f"name={BOMBS[name]}")


def test_aliases_in_good_measure_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("x: &d {train: [{path: c}]}\nname: a\n".replace("x: &d ", "data: &d ") + "model: {base: b}\n")
    assert config.load_run(path, ["train.max_steps=1"]).data.train[0].path == "c"
    just_fits = f"[{', '.join(['*a'] * 90)}]"
    assert len(parse_yaml(f"a: &a [{', '.join('1' * 999)}]\nb: {just_fits}", "x")["b"]) == 90
    assert MAX_YAML_SIZE == 100_000


WRONG = [
    "!!bool maybe",
    "!!int ''",
    "!!timestamp x",
    "2024-13-45",
    "[" * 5000,
    "{a: " * 5000,
    "0x" + "f" * 1000,
    ":".join(["1"] * 5000),
    ":".join(["1"] * 5000) + ".5",
    "!!binary x",
    "!!python/object/apply:os.system ['touch owned']",
    "&a",
    "*a",
    "a: b: c",
    "\x00",
    "%YAML 9.9\n---\na",
    "--- a\n--- b\n",
    "? [a, {b: c}]\n: d\n",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "<<: 5",
    "'" + "x" * 1000,
]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_what_yaml_makes_nothing_good_of_is_one_sentence(tmp_path: Path, value: str) -> None:
    refuse(tmp_path / "run.yaml", value)
    if not value.startswith("%YAML"):
        refuse(tmp_path / "run.yaml", GOOD.replace("name: a", f"name: {value}"))


def test_a_file_of_any_size_is_refused_after_its_beginning_was_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 36)  # a hole: 64 GiB of zeros
    with pytest.raises(ConfigError, match=f"has more than {MAX_YAML_CHARS} characters"):
        config.load_run(path)


def test_values_of_a_search_space_are_not_trusted_either() -> None:
    assert as_word("plain") == "plain"
    for text in (BOMBS["merges"], "a: b: c", "[", "5", "!!bool x"):
        assert as_word(text).startswith('"')


def test_any_text_gives_a_run_or_one_sentence(tmp_path: Path) -> None:
    tree = yaml.safe_load(GOOD)

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(
        st.one_of(
            st.text(max_size=60),
            st.text("{}[]&*a: ,!|>-\n'\"%?<0x1", max_size=40),
            st.tuples(st.integers(0, len(GOOD)), st.text("{}[]&*a: ,!|>-\n'\"%?<", max_size=4)).map(
                lambda t: GOOD[: t[0]] + t[1] + GOOD[t[0] :]
            ),
        )
    )
    def holds(text: str) -> None:
        assert isinstance(outcome(text), (str, dict, config.RunConfig))

    def outcome(text: str) -> Any:
        try:
            found = parse_yaml(text, "x")
            return config.parse_run(found, "x") if isinstance(found, dict) else str(found)
        except FtrayError as err:
            return str(err)

    assert isinstance(config.parse_run(tree, "x"), config.RunConfig)
    holds()


def test_control_characters_of_a_message_are_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('"na\\e]0;owned\\ame": a\n' + GOOD)
    assert main.main(["check", "--fast", str(path)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "unknown key na\\x1b]0;owned\\x07me" in said


def test_of_thousands_of_wrong_keys_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "".join(f"k{n}: 1\n" for n in range(5_000)))
    with pytest.raises(ConfigError) as caught:
        config.load_run(path)
    lines = str(caught.value).splitlines()
    assert "unknown key k0;" in str(caught.value)
    assert len(lines) == 102
    assert lines[-1].strip() == "and 4900 more; correct these first"
