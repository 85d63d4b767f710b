"""`ftray data index` on a Parquet file whose values are code: it is refused in one sentence, and nothing runs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests import tiny
from tests.e2e.command import Place, assert_refused


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_parquet_file_that_holds_pickled_values_is_refused_and_runs_no_code(tmp_path: Path) -> None:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    place, marker = Place(tmp_path / "desk"), tmp_path / "marker"
    tiny.write_tiny_model(place.directory / "model")
    (place.directory / "data").mkdir()
    column = ArrowPythonObjectType().wrap_array(pa.array([pickle.dumps(Payload(marker))] * 8, pa.large_binary()))
    table = pa.table({"prompt": ["q"] * 8, "completion": ["a"] * 8, "extra": column})
    pq.write_table(table, place.directory / "data/part.parquet")
    pickle.loads(pickle.dumps(Payload(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()  # the payload works
    try:
        ended = place.ftray("data", "index", place.write())
        assert_refused(ended, "data/part.parquet", "'extra'", "'ray.data.arrow_pickled_object'", code=2)
        assert not marker.exists()
        assert "Traceback" not in ended.out + ended.err
    finally:
        place.close()
