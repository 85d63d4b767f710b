"""Files → chunks → raw records: every record exactly once, whatever the chunks; what can't be read is named."""

import csv
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray import storage
from ftray.data import sources
from ftray.data.sources import (
    RawRecord,
    Shard,
    cut_shard,
    cut_source,
    line_number,
    list_shards,
    other_files,
    read_chunk,
)
from ftray.errors import DataError, StorageError
from tests.s3 import S3Server

BOM = b"\xef\xbb\xbf"


def only_shard(path: Path) -> Shard:
    (shard,) = list_shards(str(path))
    return shard


def records(shard: Shard, chunk_bytes: int) -> list[RawRecord]:
    return [record for chunk in cut_shard(shard, 0, chunk_bytes) for record in read_chunk(chunk)]


def values(path: Path, chunk_bytes: int = 1 << 20) -> list[Any]:
    return [record.value for record in records(only_shard(path), chunk_bytes)]


LINE = st.one_of(
    st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")),
    st.text("aé日🙂", min_size=1, max_size=8).map(str.encode),
    st.just(b""),
    st.just(b"  \t"),
    st.integers(20, 90).map(lambda n: b"x" * n),  # longer than several chunks
)
FILE = st.tuples(
    st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=12), st.booleans(), st.booleans()
)


def test_chunks_of_any_size_give_each_record_exactly_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "READ_AHEAD", 4)
    path = tmp_path / "part.jsonl"

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(FILE, st.integers(1, 40))
    def holds(drawn: tuple[list[tuple[bytes, bytes]], bool, bool], chunk_bytes: int) -> None:
        lines, has_mark, ends_bare = drawn
        content = BOM * has_mark + b"".join(line + end for line, end in lines)
        content = content.removesuffix(b"\n") if ends_bare else content
        path.write_bytes(content or b"\n")
        wanted = [line.strip() for line in content.removeprefix(BOM).split(b"\n") if line.strip()]
        found = records(only_shard(path), chunk_bytes)
        assert [record.value.strip() for record in found if isinstance(record.value, bytes)] == wanted
        # a record's identity is the byte offset at which it lies
        for record in found:
            assert isinstance(record.value, bytes)
            assert content[record.position : record.position + len(record.value)] == record.value

    holds()


@pytest.mark.parametrize("chunk_bytes", range(1, 30))
def test_a_character_cut_by_a_chunks_edge_stays_whole(tmp_path: Path, chunk_bytes: int) -> None:
    lines = ['{"a": "日本語"}', '{"a": "é🙂"}', '{"a": "x"}']
    path = tmp_path / "part.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert [value.decode() for value in values(path, chunk_bytes)] == lines


def test_a_chunk_inside_a_long_record_does_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "part.jsonl"
    path.write_bytes(b"x" * 1_000_000 + b"\nlast\n")
    shard, read = only_shard(path), 0
    original = sources.storage.read_range

    def counting(uri: str, start: int, end: int) -> bytes:
        nonlocal read
        found = original(uri, start, end)
        read += len(found)
        return found

    monkeypatch.setattr(sources.storage, "read_range", counting)
    assert [len(r.value) for r in records(shard, 10_000)] == [1_000_000, 4]
    assert read < 3_000_000  # twice, not a hundred times


def test_gzipped_lines_are_read_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl.gz"
    path.write_bytes(gzip.compress(BOM + b'{"a": 1}\r\n\n{"a": 2}'))
    assert [(r.position, json.loads(r.value)) for r in records(only_shard(path), 3)] == [(0, {"a": 1}), (2, {"a": 2})]


def damaged_gzips() -> dict[str, bytes]:
    words = random.Random(0).choices(["cow", "dog", "owl", "pig"], k=2000)
    whole = gzip.compress(" ".join(words).encode())
    return {
        "cut": whole[:-20],
        "flipped": whole[:20] + bytes(255 - b for b in whole[20:60]) + whole[60:],
        "no gzip": b"{}\n",
        "wrong sum": whole[:-8] + b"\0" * 8,
        "trailing": whole + b"rubbish",
    }


@pytest.mark.parametrize("kind", damaged_gzips())
def test_a_damaged_gzip_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "part.jsonl.gz"
    path.write_bytes(damaged_gzips()[kind])
    with pytest.raises(DataError, match=r"part\.jsonl\.gz is not a whole gzip file"):
        values(path)


def test_csv_keeps_newlines_commas_and_quotes_inside_fields(tmp_path: Path) -> None:
    rows = [["prompt", "completion"], ["a,b", 'say "x"\nand\r\ny'], ["日本", "z"]]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path = tmp_path / "part.csv"
    path.write_bytes(BOM + text.getvalue().encode())
    assert values(path) == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    zipped = tmp_path / "zipped.csv.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert values(zipped) == values(path)


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "part.csv"
    path.write_text(f"prompt,completion\n{'x' * 300_000},y\n")
    assert [len(value["prompt"]) for value in values(path)] == [300_000]


def test_csv_fields_beyond_the_header_are_kept_to_be_told(tmp_path: Path) -> None:
    path = tmp_path / "part.csv"
    path.write_text("prompt,completion\nhi,Hello, there\nhi\n")
    assert values(path) == [
        {"prompt": "hi", "completion": "Hello", None: [" there"]},
        {"prompt": "hi", "completion": None},
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\xff,b\n1,2\n", "is not UTF-8 (byte 1); convert it"),
        (b"a,b,a\n1,2,3\n", "has the column 'a' twice; rename one"),
    ],
)
def test_a_csv_that_can_not_be_read_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "part.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        values(path)
    assert str(caught.value).startswith(f"{path} {words}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'p,c\n1,2\n\nq,"5 feet 3""\nq3,a3\n', r"line 4: a quote is not closed"),
        (b'p,c\n"a\nb",2\n"a"b,2\n', r"line 4: not CSV: ',' expected"),
        (b'p,"c\n1,2\n', r"line 1: a quote is not closed"),
    ],
)
def test_a_quote_that_is_not_closed_is_an_error_with_its_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "part.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        values(path)


def test_a_json_array_gives_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    path.write_bytes(BOM + b'[{"a": 1}, 7, {"a": 2}]')
    assert [(r.position, r.value) for r in records(only_shard(path), 2)] == [(0, {"a": 1}), (1, b"7"), (2, {"a": 2})]


def test_json_lines_in_a_json_file_are_read_as_lines_and_a_bad_one_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    path.write_bytes(BOM + b'\n{"a": 1}\n\n{"a": \n{"a": 2}')
    assert [(r.position, r.value) for r in records(only_shard(path), 2)] == [
        (1, b'{"a": 1}'),
        (3, b'{"a": '),
        (4, b'{"a": 2}'),
    ]


@pytest.mark.parametrize("name", ["A.JSONL", "a.Json", "a.CSV", "A.PARQUET", "a.jsonl.GZ", "a.JSONL.zst"])
def test_extensions_may_be_in_upper_case(tmp_path: Path, name: str) -> None:
    path, lines = tmp_path / name, b'{"a": "1"}\n'
    if "parquet" in name.lower():
        pq.write_table(pa.table({"a": ["1"]}), path)
    elif "gz" in name.lower():
        path.write_bytes(gzip.compress(lines))
    elif "zst" in name.lower():
        path.write_bytes(zstandard.compress(lines))
    else:
        path.write_bytes(b"a\n1\n" if "csv" in name.lower() else lines)
    found = values(tmp_path)
    assert [json.loads(v) if isinstance(v, bytes) else v for v in found] == [{"a": "1"}]


@pytest.mark.parametrize(
    "content",
    [b'{"a":\n1}', b"7", b"[", b"\xff", b"[" * 100_000],
    ids=["object over lines", "number", "cut", "bytes", "deep"],
)
def test_a_json_file_that_is_no_array_is_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "part.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part\.json is not (JSON|a JSON array).*one record a line"):
        values(path)


def test_parquet_is_cut_at_row_groups_and_each_row_comes_once(tmp_path: Path) -> None:
    path, rows = tmp_path / "part.parquet", [{"n": n, "text": f"é{n}"} for n in range(103)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    shard = only_shard(path)
    for chunk_bytes, num_chunks in ((1, 11), (1 << 30, 1)):
        assert len(cut_shard(shard, 0, chunk_bytes)) == num_chunks
        assert [(r.position, r.value) for r in records(shard, chunk_bytes)] == list(enumerate(rows))
    some = cut_shard(shard, 0, 3 * pq.read_metadata(path).row_group(0).total_byte_size)
    assert [(c.start, c.end) for c in some] == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert [r.value for chunk in some for r in read_chunk(chunk)] == rows


def test_a_damaged_parquet_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"part\.parquet cannot be read"):
        cut_shard(only_shard(path), 0, 1)
    pq.write_table(pa.Table.from_pylist([{"text": "word " * n} for n in range(200)]), path)
    content = bytearray(path.read_bytes())
    content[40:200] = bytes(160)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part\.parquet cannot be read"):
        values(path)


def test_a_shard_that_changed_since_it_was_listed_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    path.write_text('{"a": 1}\n')
    (chunk,) = cut_shard(only_shard(path), 0, 1 << 20)
    assert len(list(read_chunk(chunk))) == 1
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(
        DataError, match=r"part\.jsonl changed while the run was using it; restore it, or start a new run"
    ):
        list(read_chunk(chunk))
    path.write_text('{"a": 3}\n')  # the same size, another time
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed while the run was using it"):
        list(read_chunk(chunk))
    path.unlink()
    with pytest.raises(StorageError, match=r"part\.jsonl does not exist"):
        list(read_chunk(chunk))


def test_a_source_is_a_file_a_directory_or_a_pattern(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.parquet", "a.csv", "README.md", "b/empty.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else "x\n")
    assert [s.path for s in list_shards(str(tmp_path))] == ["a.csv", "b/1.parquet", "b/2.jsonl"]
    assert [s.path for s in list_shards(f"{tmp_path}/b")] == ["1.parquet", "2.jsonl"]
    assert [s.path for s in list_shards(f"{tmp_path}/b/*.jsonl")] == ["2.jsonl"]
    assert [s.path for s in list_shards(f"{tmp_path}/**/*.jsonl")] == ["b/2.jsonl"]
    assert [s.path for s in list_shards(f"{tmp_path}/a.csv")] == ["a.csv"]


def test_what_is_not_read_beside_the_shards_is_told(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.bz2", "deep/c.JSONL", "README.md", "_SUCCESS", ".part.crc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "empty.jsonl").touch()
    assert [s.path for s in list_shards(str(tmp_path))] == ["a.jsonl", "deep/c.JSONL"]
    assert other_files(str(tmp_path)) == ["README.md", "b.jsonl.bz2", "empty.jsonl"]
    assert other_files(str(tmp_path / "a.jsonl")) == []


def test_what_is_marked_as_no_data_is_passed_over_in_a_directory_and_read_when_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "_old.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert [shard.path for shard in list_shards(str(tmp_path))] == ["a.jsonl"]
    assert [shard.path for shard in list_shards(str(tmp_path / "_old.jsonl"))] == ["_old.jsonl"]


def test_copies_elsewhere_have_the_same_paths_and_chunks(tmp_path: Path) -> None:
    for place in ("here", "there/deep"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "p.jsonl").write_bytes(b'{"a": 1}\n' * 100)
    cuts = [
        [(c.path, c.start, c.end) for s in list_shards(str(tmp_path / place)) for c in cut_shard(s, 0, 100)]
        for place in ("here", "there/deep")
    ]
    assert cuts[0] == cuts[1]
    assert len(cuts[0]) == 9


NOTHING = {
    "none.jsonl": "{}/none.jsonl does not exist; correct data.train or data.eval",
    "none": "{}/none: no such file or directory, or nothing in it; correct data.train or data.eval",
    "*.parquet": "{}/*.parquet: no such file or directory, or nothing in it; correct data.train or data.eval",
    "hollow": "{}/hollow: no such file or directory, or nothing in it; correct data.train or data.eval",
    "words.txt": "{}/words.txt contains words.txt, but no .jsonl, .ndjson, .json, .parquet, .csv",
    "texts": "{}/texts contains a.txt, but no .jsonl, .ndjson, .json, .parquet, .csv",
    "empty.jsonl": "{}/empty.jsonl: the file is empty; add records, or correct the path",
}


@pytest.mark.parametrize(("path", "words"), NOTHING.items())
def test_a_source_with_nothing_to_read_is_refused_with_the_remedy(tmp_path: Path, path: str, words: str) -> None:
    for folder in ("hollow", "texts"):
        (tmp_path / folder).mkdir()
    for name in ("words.txt", "texts/a.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError) as caught:
        list_shards(str(tmp_path / path))
    assert str(caught.value).startswith(words.format(tmp_path))


def test_a_position_is_told_as_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 5)
    path = tmp_path / "part.jsonl"
    path.write_bytes(b"".join(b"%d\n" % n for n in range(200)))
    assert [line_number(str(path), r.position) for r in records(only_shard(path), 50)] == list(range(1, 201))
    assert line_number("x.parquet", 3) is None


def test_zstd_files_are_read_as_their_content_also_in_several_frames(tmp_path: Path) -> None:
    lines = BOM + b'{"a": 1}\r\n\n{"a": 2}'
    (tmp_path / "part.jsonl.zst").write_bytes(zstandard.compress(lines[:9]) + zstandard.compress(lines[9:]))
    assert [(r.position, r.value) for r in records(only_shard(tmp_path / "part.jsonl.zst"), 5)] == [
        (0, b'{"a": 1}\r'),
        (2, b'{"a": 2}'),
    ]
    (tmp_path / "part.csv.zst").write_bytes(zstandard.compress(b"a,b\n1,2\n"))
    assert values(tmp_path / "part.csv.zst") == [{"a": "1", "b": "2"}]
    (tmp_path / "part.json.zst").write_bytes(zstandard.compress(b'[{"a": 1}]'))
    assert values(tmp_path / "part.json.zst") == [{"a": 1}]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-10], lambda whole: whole + b"xx", lambda whole: b"{}\n"])
def test_a_damaged_zstd_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "part.jsonl.zst"
    path.write_bytes(damage(zstandard.compress(random.Random(0).randbytes(3000))))
    with pytest.raises(DataError, match=r"part\.jsonl\.zst is not a whole zstd file"):
        values(path)


def test_a_chunk_of_parquet_on_s3_reads_its_row_groups_and_no_more(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    table = pa.table({"text": [rng.randbytes(2000).hex() for _ in range(400)]})
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=20)
    whole = (tmp_path / "part.parquet").read_bytes()
    assert s3.request("PUT", "/data/ranges/part.parquet", whole)[0] == 200
    read: list[int] = []
    plain = storage.read_range

    def counted(uri: str, start: int, end: int) -> bytes:
        read.append(end - start)
        return plain(uri, start, end)

    monkeypatch.setattr(storage, "read_range", counted)
    (shard,) = list_shards("s3://data/ranges/")
    chunks = cut_shard(shard, 0, 1)
    assert [r.value for c in chunks for r in read_chunk(c)] == table.to_pylist()
    read.clear()
    assert [r.position for r in read_chunk(chunks[7])] == list(range(140, 160))
    assert sum(read) < len(whole) / 4


# --- Arrow


def test_columns_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    odd = pa.array([10**17] * 3, pa.timestamp("ms"))
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "created": odd}), path)
    (chunk,) = cut_shard(only_shard(path), 0, 1 << 20)
    assert [r.value for r in read_chunk(chunk, lambda name: name != "created")] == [{"prompt": p} for p in "abc"]
    with pytest.raises(DataError, match=r"part\.parquet: the column 'created' cannot be read \(.*; correct its values"):
        list(read_chunk(chunk))
    with pytest.raises(DataError, match=r"none of the required columns; it has prompt, created"):
        list(read_chunk(chunk, lambda name: False))


def test_nulls_that_arrow_fills_in_are_absent_at_any_depth_and_json_is_decoded(tmp_path: Path) -> None:
    rows = [
        {"a": [{"x": 1, "y": {"p": None, "q": 2}}, {"x": None, "y": None}], "b": None},
        {"a": None, "b": "t"},
    ]
    table = pa.Table.from_pylist(rows)
    texts = pa.array(['{"k": null}', "[1"], pa.string())
    table = table.append_column(pa.field("j", pa.json_()), pa.ExtensionArray.from_storage(pa.json_(), texts))
    path = tmp_path / "part.parquet"
    pq.write_table(table, path)
    assert values(path) == [
        {"a": [{"x": 1, "y": {"q": 2}}, {}], "b": None, "j": {"k": None}},
        {"a": None, "b": "t", "j": "[1"},
    ]


def saved(directory: Path, num_records: int = 2500) -> list[dict[str, Any]]:
    """A folder of `save_to_disk` with record batches of 1,000 records."""
    import datasets

    rows = [{"n": n, "turns": [{"role": "user", "content": f"{n:x}"}]} for n in range(num_records)]
    datasets.Dataset.from_list(rows).save_to_disk(str(directory))
    return rows


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 1 << 20])
def test_a_folder_of_save_to_disk_is_read_by_record_batch(tmp_path: Path, chunk_bytes: int) -> None:
    rows = saved(tmp_path / "set")
    chunks = [chunk for shard in list_shards(str(tmp_path / "set")) for chunk in cut_shard(shard, 0, chunk_bytes)]
    assert len(chunks) == {1: 3, 10_000: 3, 1 << 20: 1}[chunk_bytes]
    assert [(r.position, r.value) for chunk in chunks for r in read_chunk(chunk)] == list(enumerate(rows))
    assert other_files(str(tmp_path / "set")) == []


def test_of_a_saved_folder_with_splits_one_must_be_chosen(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / "set" / split, 2)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits test, train; choose one, for example .*/set/test"):
        list_shards(str(tmp_path / "set"))
    assert len(list_shards(str(tmp_path / "set" / "test"))) == 1


def test_the_random_access_format_of_arrow_is_read_too_and_compressed_buffers_are_rejected(tmp_path: Path) -> None:
    path, table = tmp_path / "part.arrow", pa.table({"a": ["x", "y"]})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert values(path) == [{"a": "x"}, {"a": "y"}]
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"part\.arrow cannot be read as an Arrow file: its buffers are compressed"):
        values(path)


# --- small files


def small_files(directory: Path, number: int) -> list[Shard]:
    for n in range(number):
        (directory / f"f{n:03d}.jsonl").write_text(json.dumps({"n": n}) + "\n")
    return list_shards(str(directory))


def test_small_files_share_a_chunk_by_the_listing_alone_and_each_record_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = small_files(tmp_path, 200)
    (chunk,) = cut_source(shards, 0, 1 << 20)
    assert [piece.path for piece in chunk.pieces] == [shard.path for shard in shards]
    found = list(read_chunk(chunk))
    assert [json.loads(r.value) for r in found] == [{"n": n} for n in range(200)]
    assert len({r.position for r in found}) == 200
    assert [chunk.locate(r.position)[0].uri for r in found] == [shard.uri for shard in shards]
    assert all(chunk.locate(r.position)[1] == 0 for r in found)
    assert cut_source(shards, 0, 1 << 20) == [chunk]
    monkeypatch.setattr(sources, "MAX_FILES", 60)
    assert [len(c.pieces) for c in cut_source(shards, 0, 1 << 20)] == [60, 60, 60, 20]
    size = sum(shard.size_bytes for shard in shards[:20])
    assert sum(len(c.pieces) for c in cut_source(shards, 0, size)) == 200
    assert max(sum(p.end - p.start for p in c.pieces) for c in cut_source(shards, 0, size)) <= size


def test_a_large_file_between_small_ones_keeps_its_own_chunks(tmp_path: Path) -> None:
    small_files(tmp_path, 3)
    (tmp_path / "f001.jsonl").write_text(json.dumps({"n": "x" * 3000}) + "\n")
    pq.write_table(pa.table({"n": [7, 8]}), tmp_path / "f003.parquet")
    chunks = cut_source(list_shards(str(tmp_path)), 0, 40_000)
    assert [[piece.path for piece in chunk.pieces] for chunk in chunks] == [
        ["f000.jsonl", "f002.jsonl", "f003.parquet"],
        ["f001.jsonl"],
    ]
    values = [r.value for r in read_chunk(chunks[0])]
    assert [json.loads(v) if isinstance(v, bytes) else v for v in values] == [{"n": 0}, {"n": 2}, {"n": 7}, {"n": 8}]


def test_a_changed_file_of_a_group_is_named(tmp_path: Path) -> None:
    (chunk,) = cut_source(small_files(tmp_path, 3), 0, 1 << 20)
    (tmp_path / "f001.jsonl").write_text('{"n": "changed"}\n')
    with pytest.raises(DataError, match=r"f001\.jsonl changed while the run was using it"):
        list(read_chunk(chunk))


def test_an_item_of_a_json_array_that_repeats_a_key_is_its_text_and_the_others_are_read(tmp_path: Path) -> None:
    bad = '{"x": {"a": 1, "a": 2}, "long": "' + "é" * 200_000 + '"}'  # longer than a piece that is read at once
    path = tmp_path / "r.json"
    path.write_text(f'[{{"a": 1}}, {bad}, {{"a": 3}}]')
    assert values(path) == [{"a": 1}, bad.encode(), {"a": 3}]
