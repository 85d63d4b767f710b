"""What a hostile author of data can do: nothing but have their file refused, in one sentence and in little memory."""

from __future__ import annotations

import gzip
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401 - registers the extension type whose values are unpickled, as every worker has it
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.chat import ChatFormat
from ftray.data import arrow_rows, decompress, examples
from ftray.data.parquet import check_schema
from ftray.data.sources import cut_shard, list_shards, read_chunk
from ftray.errors import DataError, FtrayError
from tests import tiny

MIB = 1 << 20


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def pickled(marker: Path) -> pa.ExtensionArray:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    blob = pickle.dumps(Payload(marker))
    return ArrowPythonObjectType().wrap_array(pa.array([blob], pa.large_binary()))


def in_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays([0, 1], values)


NESTINGS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "column": lambda v: v,
    "list": in_list,
    "large list": lambda v: pa.LargeListArray.from_arrays([0, 1], v),
    "fixed-size list": lambda v: pa.FixedSizeListArray.from_arrays(v, 1),
    "struct": lambda v: pa.StructArray.from_arrays([v], ["x"]),
    "list of structs": lambda v: in_list(pa.StructArray.from_arrays([v], ["x"])),
    "map": lambda v: pa.MapArray.from_arrays([0, 1], pa.array(["k"]), v),
}


def read(path: Path) -> list[Any]:
    return [r.value for s in list_shards(str(path)) for c in cut_shard(s, 0, 1 << 20) for r in read_chunk(c)]


@pytest.mark.parametrize("nesting", NESTINGS)
def test_pickled_values_of_a_parquet_file_are_never_read(tmp_path: Path, nesting: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "part.parquet"
    column = NESTINGS[nesting](pickled(marker))
    pq.write_table(pa.table({"prompt": ["q"], "completion": ["a"], "extra": column}), path)
    with pytest.raises(
        DataError, match=r"part\.parquet: the column 'extra' has the extension type 'ray\.data\.arrow_pic"
    ):
        read(path)
    assert not marker.exists()


EXTENSION = pa.opaque(pa.int8(), "x", "y")
DEEP = {
    "list view": pa.list_view(EXTENSION),
    "large list view": pa.large_list_view(EXTENSION),
    "dictionary": pa.dictionary(pa.int8(), pa.list_(EXTENSION)),
    "run-end-encoded": pa.run_end_encoded(pa.int32(), EXTENSION),
    "sparse union": pa.sparse_union([pa.field("a", pa.int8()), pa.field("b", EXTENSION)]),
    "dense union": pa.dense_union([pa.field("a", EXTENSION)]),
    "map key": pa.map_(EXTENSION, pa.int8()),
    "map item": pa.map_(pa.string(), EXTENSION),
    "storage of an extension": pa.opaque(pa.list_(EXTENSION), "x", "y"),
}


@pytest.mark.parametrize("name", DEEP)
def test_an_extension_type_is_found_at_any_depth(name: str) -> None:
    for nested in (DEEP[name], pa.struct([("a", pa.list_(DEEP[name]))])):
        with pytest.raises(DataError, match=r"x\.parquet: the column 'c' has the extension type 'arrow\.opaque'"):
            check_schema(pa.schema([("c", nested)]), "x.parquet")


def test_an_extension_type_that_no_library_here_knows_is_refused_too() -> None:
    field = pa.field("c", pa.binary(), metadata={b"ARROW:extension:name": b"other.pickle"})
    with pytest.raises(DataError, match=r"extension type 'other\.pickle'"):
        check_schema(pa.schema([field]), "x.parquet")
    with pytest.raises(DataError, match=r"extension type 'other\.pickle'"):
        check_schema(pa.schema([pa.field("d", pa.struct([field]))]), "x.parquet")


def test_harmless_extension_types_and_all_plain_types_are_read(tmp_path: Path) -> None:
    columns = {
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}'])),
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16))),
        "turns": pa.array([[{"role": "user", "content": "é"}]]),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
        "word": pa.array(["w"]).dictionary_encode(),
        "text": pa.array(["t"], pa.large_string()),
        "none": pa.nulls(1),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "part.parquet")
    assert read(tmp_path / "part.parquet") == [{**table.to_pylist()[0], "json": {"a": 1}}]


def test_the_types_that_libraries_register_run_no_code_when_a_schema_is_opened(tmp_path: Path) -> None:
    """A type's own parameters are in the file, too: those of Ray's tensors were once pickled."""
    marker, path = tmp_path / "marker", tmp_path / "part.parquet"
    for name in ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor"):
        metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": pickle.dumps(Payload(marker))}
        storage = pa.list_(pa.int64()) if name.endswith("tensor") else pa.large_list(pa.int64())
        schema = pa.schema([pa.field("c", storage, metadata=metadata)])
        pq.write_table(pa.table([pa.array([[1]], storage)], schema=schema), path)
        with pytest.raises(DataError, match=r"part\.parquet"):
            read(path)
    assert not marker.exists()


# --- small files that stand for large ones


def peak_mib(action: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def refuse(path: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read(path)
    assert "\n" not in str(caught.value)


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": lambda b: zstandard.compress(b, 19)}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_compressed_file_that_expands_too_far_is_refused_in_little_memory(
    tmp_path: Path, suffix: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompress, "FREE_BYTES", MIB // 2)
    head, item = {"jsonl": (b"", b'{"a": ""}\n'), "json": (b"[0", b',""\n'), "csv": (b"a\n", b'""\n')}[kind]
    item = item.replace(b'""', b'"%s"' % (b"x" * 500))
    path = tmp_path / f"part.{kind}.{suffix}"
    path.write_bytes(PACK[suffix](head + item * (2 * MIB // len(item))))

    def count() -> None:
        (shard,) = list_shards(str(path))
        for chunk in cut_shard(shard, 0, 1 << 20):
            for _ in read_chunk(chunk):
                pass

    def consume() -> None:
        with pytest.raises(DataError, match=r"expands from \d+ to more than \d+ bytes, over 200-fold"):
            count()

    assert peak_mib(consume) < 20  # a list of short lines takes more than their bytes


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_record_of_any_size_is_refused_in_little_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompress, "MAX_RECORD_BYTES", MIB)
    monkeypatch.setattr(decompress, "FREE_BYTES", MIB)
    monkeypatch.setattr(decompress, "MAX_RATIO", 1 << 20)
    text = {"jsonl": b'{"text": "', "json": b'[{"text": "', "csv": b'text\n"'}[name.split(".")[1]] + b"x" * (24 * MIB)
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert peak_mib(lambda: refuse(tmp_path / name, r"a record of more than 1 MiB|field larger than field limit")) < 20


def test_a_parquet_file_of_nothing_but_nulls_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": pa.nulls(3_000_000, pa.string())}), path)
    assert path.stat().st_size < 20_000
    refuse(path, r"holds 3000000 records, 3000000 values in one column, in \d+ bytes")
    nested = pa.ListArray.from_arrays([0, 3_000_000], pa.nulls(3_000_000, pa.string()))
    pq.write_table(pa.table({"text": nested}), path)
    refuse(path, r"holds 1 records, 3000000 values in one column")


@pytest.mark.parametrize("codec", ["zstd", "gzip", "brotli"])
def test_a_parquet_page_that_expands_too_far_is_refused_before_it_is_decompressed(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ftray.data.parquet as parquet

    monkeypatch.setattr(parquet, "FREE_BYTES", MIB)
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": ["x" * 8 * MIB, "y"]}), path, compression=codec, use_dictionary=False)
    before = pa.default_memory_pool().max_memory()
    refuse(path, r"row group 0 expands from \d+ to \d+ bytes, more than 200-fold")
    assert pa.default_memory_pool().max_memory() - before < 4 * MIB


def test_one_large_text_that_a_dictionary_repeats_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.parquet"
    text = "x" * 40_000
    lists = pa.ListArray.from_arrays(pa.array([0, 500], pa.int32()), pa.array([text] * 500))
    pq.write_table(pa.table({"a": lists}), path, compression="snappy")
    refuse(path, "record 0 takes more than 16 MiB")
    pq.write_table(pa.table({"a": pa.array([text] * 200)}), path)
    monkeypatch.setattr(arrow_rows, "MAX_RECORD_BYTES", MIB)
    assert len(read(path)) == 200  # one by one


def test_a_file_of_very_many_columns_is_refused(tmp_path: Path) -> None:
    """Each row of a CSV file, however short, has a value for each column."""
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"c{i}" for i in range(200_000)) + "\n" + "a\n" * 1000)
    with pytest.raises(DataError, match="has 200000 columns; the limit is 1024"):
        read(path)
    with pytest.raises(DataError, match="has 20000 columns; the limit is 10000"):
        check_schema(pa.schema([(f"c{i}", pa.string()) for i in range(20_000)]), "wide.parquet")
    path.write_text(",".join(f"c{i}" for i in range(1024)) + "\na\n")
    (row,) = read(path)
    assert row["c0"] == "a"
    assert row["c1023"] is None


def test_a_csv_row_of_many_large_fields_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "rows.csv"
    path.write_text("a,b,c\n" + '"x\ny",b,c\n' * 500)  # many rows may be larger together
    assert len(read(path)) == 500
    path.write_text("a,b,c\n" + ",".join(['"' + "x\n" * 200 + '"'] * 3) + "\n")
    with pytest.raises(DataError, match=r"rows\.csv, a row: a record of more than"):
        read(path)


def test_dates_that_python_has_not_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    for column in (pa.array([-(2**62)], pa.timestamp("us")), pa.array([1], pa.timestamp("s", "No/Where"))):
        pq.write_table(pa.table({"at": column}), path)
        refuse(path, r"part\.parquet: the column 'at' cannot be read")


def test_pages_are_found_in_real_files_of_any_shape(tmp_path: Path) -> None:
    from ftray.data.parquet_pages import page_sizes

    path = tmp_path / "part.parquet"
    table = pa.table({"n": range(5000), "text": [f"{n:x}" * (n % 40) for n in range(5000)]})
    for version in ("1.0", "2.0"):
        for statistics in (True, False):
            pq.write_table(
                table, path, compression="zstd", data_page_size=4000, data_page_version=version,
                write_statistics=statistics, row_group_size=2000, write_page_checksum=True,
            )  # fmt: skip
            metadata = pq.read_metadata(path)
            with path.open("rb") as file:
                for group in range(metadata.num_row_groups):
                    for number in range(2):
                        column = metadata.row_group(group).column(number)
                        sizes = list(page_sizes(file, column))
                        assert len(sizes) >= 2
                        headers = column.total_compressed_size - sum(packed for _, packed in sizes)
                        assert 0 < headers < 200 * len(sizes)
                        assert column.total_uncompressed_size - sum(plain for plain, _ in sizes) == headers


# --- any bytes


def outcome(path: Path) -> str:
    try:
        return f"{len(read(path))} records"
    except FtrayError as err:
        return str(err)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.json.zst"])
def test_any_bytes_give_records_or_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = {"a.jsonl": b'{"a": 1}\n', "a.json": b'[{"a": "\xc3\xa9"}, 1]', "a.csv": b'a,b\n1,"2\n3"\n'}
    whole["a.jsonl.gz"] = gzip.compress(whole["a.jsonl"])
    whole["a.json.zst"] = zstandard.compress(whole["a.json"])
    pq.write_table(pa.table({"a": [[{"b": "text", "c": None}], [], None] * 20}), tmp_path / "seed", compression="zstd")
    whole["a.parquet"] = (tmp_path / "seed").read_bytes()
    with pa.ipc.new_stream(tmp_path / "seed.stream", pa.schema({"a": pa.list_(pa.string())})) as writer:
        writer.write_table(pa.table({"a": [["text", None], [], None] * 20}))
    whole["a.arrow"] = (tmp_path / "seed.stream").read_bytes()
    seed = whole[name]
    spoiled = st.one_of(
        st.binary(min_size=1, max_size=60),
        st.tuples(st.integers(0, len(seed) - 1), st.binary(min_size=1, max_size=4)).map(
            lambda t: seed[: t[0]] + t[1] + seed[t[0] + len(t[1]) :]
        ),
        st.integers(1, len(seed)).map(lambda n: seed[:n]),
    )

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(spoiled)
    def holds(content: bytes) -> None:
        path.write_bytes(content)
        assert "\n" not in outcome(path)

    holds()


# --- datasets of a hub


@pytest.mark.parametrize("pattern", ["../secret.jsonl", "../*.jsonl", "{root}/secret.jsonl", "sub/../../secret.jsonl"])
def test_a_dataset_that_names_files_outside_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    import datasets

    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "secret.jsonl").write_text('{"prompt": "secret-7919", "completion": "b"}\n')
    dataset = tmp_path / "set"
    (dataset / "sub").mkdir(parents=True)
    (dataset / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    names = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{pattern.format(root=tmp_path)}'\n"
    (dataset / "README.md").write_text(f"---\n{names}---\n")
    with pytest.raises(
        DataError, match=r"secret\.jsonl as its data, which is not a file of that dataset|could not be loaded"
    ):
        list_shards(f"hf:{dataset}")
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    (dataset / "README.md").write_text(f"---\n{names.replace(pattern.format(root=tmp_path), 'train.jsonl')}---\n")
    assert len(list_shards(f"hf:{dataset}")) == 1


def test_a_file_of_nothing_but_bad_records_is_refused_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "MAX_BAD_RECORDS", 100)
    (tmp_path / "part.jsonl").write_bytes(b"1\n" * 5000)
    (chunk,) = cut_shard(list_shards(str(tmp_path / "part.jsonl"))[0], 0, 1 << 20)
    chat = ChatFormat(tiny.make_tokenizer())
    seen = []
    with pytest.raises(DataError, match=r"part\.jsonl has more than 100 bad records in one piece, the last at 200"):
        seen.extend(examples.read_examples(chunk, chat, examples.Rules(100, "auto", None, None, None)))
