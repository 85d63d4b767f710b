"""TensorBoard: one event file for each committed segment, below `<run>/tensorboard/` in the run's storage."""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from pathlib import Path

from ftray import config, storage
from ftray.events.trackers.base import Segment, metric_values

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.\d{8}-\d{8}-[0-9a-f]{8}")


class TensorBoard:
    """The name of an event file holds its steps and a checksum.

    Files that are there are not written again; those that are no longer on the committed timeline are deleted.
    """

    def __init__(self, _: config.RunConfig, run_dir: str) -> None:
        self._directory = storage.join(run_dir, "tensorboard")
        files = storage.list_files(self._directory)
        self._written = {f.path: f.uri for f in files if _EVENT_FILE.fullmatch(f.path)}  # others are a user's

    def update(self, segments: list[Segment]) -> None:
        """Writes the segments that are new, and deletes what the timeline has left behind."""
        wanted = {}
        for lines in segments:
            checksum = zlib.crc32(json.dumps(lines).encode())
            wanted[f"events.out.tfevents.{lines[0]['step']:08d}-{lines[-1]['step']:08d}-{checksum:08x}"] = lines
        for name in self._written.keys() - wanted.keys():
            storage.delete(self._written.pop(name))
        for name in wanted.keys() - self._written.keys():
            uri = storage.join(self._directory, name)
            storage.write_bytes(uri, _event_file(wanted[name]))
            self._written[name] = uri

    def close(self, state: str) -> None:
        """Nothing to do."""

    def abandon(self) -> None:
        """Nothing to do."""


def _event_file(lines: Segment) -> bytes:
    """The bytes of an event file: one event per step, with all of its values."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        path = Path(scratch, "events")
        writer = RecordWriter(str(path))
        writer.write(Event(wall_time=lines[0]["unix_s"], file_version="brain.Event:2").SerializeToString())
        for line in lines:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metric_values(line).items()]
            event = Event(wall_time=line["unix_s"], step=line["step"], summary=Summary(value=values))
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()
