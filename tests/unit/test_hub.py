"""A dataset of the hub becomes files like any others: once, whole, and under a name that covers its content."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ftray.data import hub
from ftray.data.sources import cut_shard, list_shards, read_chunk
from ftray.errors import DataError


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A local directory in the layout of a hub dataset: one file for each split."""
    directory = tmp_path / "data"
    write(directory / "train.jsonl", 2500)
    write(directory / "test.jsonl", 30)
    return directory


def write(path: Path, number: int, word: str = "a") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": word}) + "\n" for n in range(number)))


def prompts(path: str) -> list[str]:
    chunks = [chunk for shard in list_shards(path) for chunk in cut_shard(shard, 0, 1)]
    return [str(r.value["prompt"]) for c in chunks for r in read_chunk(c) if isinstance(r.value, dict)]


def test_all_records_of_the_named_split_are_there_in_order(dataset: Path) -> None:
    assert prompts(f"hf:{dataset}") == [f"q{n}" for n in range(2500)]
    assert prompts(f"hf:{dataset}:test") == [f"q{n}" for n in range(30)]
    assert prompts(f"hf:{dataset}:train[5:8]") == ["q5", "q6", "q7"]


def test_its_files_are_cut_into_chunks(dataset: Path) -> None:
    (shard,) = list_shards(f"hf:{dataset}")
    assert shard.path == "part-00000.parquet"
    assert [(c.start, c.end) for c in cut_shard(shard, 0, 1)] == [(0, 1), (1, 2), (2, 3)]


def test_it_is_written_once_and_anew_when_the_dataset_changed(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list_shards(f"hf:{dataset}:test")
    written: list[str] = []
    plain = hub._write
    monkeypatch.setattr(hub, "_write", lambda *a: (written.append("x"), plain(*a)))
    assert list_shards(f"hf:{dataset}:test") == first
    assert not written
    write(dataset / "test.jsonl", 30, "another answer")
    assert list_shards(f"hf:{dataset}:test")[0].uri != first[0].uri
    assert written == ["x"]


def test_nothing_half_written_stays(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "FILE_RECORDS", 10)
    import datasets

    plain, done = datasets.Dataset.to_parquet, []

    def broken(self: object, path: str, **more: object) -> object:
        if done:
            raise OSError(28, "no space left on device")
        done.append(path)
        return plain(self, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "to_parquet", broken)
        with pytest.raises(OSError, match="no space left"):
            list_shards(f"hf:{dataset}:test")
    assert list((tmp_path / "cache/hub").iterdir()) == []
    assert len(list_shards(f"hf:{dataset}:test")) == 3


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf:org/name", {"name": "org/name", "config": None, "split": None, "revision": None}),
        ("hf:org/name/conf.2:test", {"name": "org/name", "config": "conf.2", "split": "test", "revision": None}),
        ("hf:org/name@refs/pr/1", {"name": "org/name", "config": None, "split": None, "revision": "refs/pr/1"}),
        ("hf:org/name:train[:10%]@abc", {"name": "org/name", "split": "train[:10%]", "revision": "abc"}),
    ],
)
def test_a_path_names_dataset_config_split_and_revision(
    path: str, expected: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    class Builder:
        config = SimpleNamespace(data_files=None)

        def __init__(self, base: str, config: str | None, revision: str | None) -> None:
            self.names = (base, config, revision)

        def download_and_prepare(self) -> None:
            pass

        def as_dataset(self, split: str) -> None:
            base, config, revision = self.names
            asked.append((base, config, split, revision))
            raise ValueError("no such dataset\nanywhere")

    import datasets

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    with pytest.raises(DataError) as caught:
        list_shards(path)
    assert str(caught.value) == f"{path} could not be loaded: no such dataset anywhere"
    wanted = (expected["name"], expected.get("config"), expected["split"] or "train", expected["revision"])
    assert asked == [wanted]


@pytest.mark.parametrize("path", ["hf:name", "hf:", "hf:org/name/a/b", "hf:org/name:", "hf:a b/c"])
def test_a_path_of_another_form_is_refused_with_the_form(path: str) -> None:
    with pytest.raises(DataError, match="is not a dataset of the hub; write hf:org/name"):
        list_shards(path)


def test_a_split_that_is_not_there_and_a_hub_that_is_not_reached_are_one_sentence(dataset: Path) -> None:
    with pytest.raises(DataError, match=r'could not be loaded: Unknown split "nope"'):
        list_shards(f"hf:{dataset}:nope")
    with pytest.raises(DataError, match=r"hf:nobody/nothing-of-that-name could not be loaded: .*") as caught:
        list_shards("hf:nobody/nothing-of-that-name")
    assert "\n" not in str(caught.value)
