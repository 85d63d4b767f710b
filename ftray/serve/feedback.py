"""What users thought of answers, as records for the next training run. Knows storage, no HTTP.

`<run>/feedback/up/` holds conversations worth learning (praised, or corrected), `down/` the others; each record is a line
of JSON in the shape `messages`, so that `data.train: [{path: <run>/feedback/up}]` takes them as they are.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime

from ftray import storage
from ftray.serve.protocol import FeedbackRequest


def write_feedback(place: str, told: FeedbackRequest) -> str:
    """Writes one record below `<place>/feedback/` and returns its URI. Raises StorageError."""
    messages = [message.turn() for message in told.messages]
    if told.correction is not None:
        messages[-1] = {"role": "assistant", "content": told.correction}
    now = datetime.now(UTC)
    opinion = told.model_dump(include={"rating", "comment", "model", "id"}, exclude_none=True)
    record = {"messages": messages, "feedback": {**opinion, "time": now.isoformat(timespec="seconds")}}
    folder = "up" if told.rating == "up" or told.correction is not None else "down"
    name = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}.jsonl"
    uri = storage.join(place, "feedback", folder, name)
    storage.write_bytes(uri, json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return uri
