"""Stores users' feedback as records for the next training run, within limits per API key. Knows storage, but not HTTP.

`<run>/feedback/up/` has conversations worth training on (praised or corrected), `down/` the others. Each record is a line of
JSON
in the format `messages`, so `data.train: [{path: <run>/feedback/up}]` reads them as they are. A record has the id of the key
that
left it, so all records of one key can be found and removed.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime

from ftray import config, storage
from ftray.serve.auth import is_answer_of, key_id
from ftray.serve.openai import RequestError
from ftray.serve.openai_requests import FeedbackRequest
from ftray.serve.rate_limit import TokenBucket

_DAY_S = 86400.0
_MAX_CALLERS = 10_000


class FeedbackBox:
    """Stores feedback within limits per key.

    Args:
        place: URI that contains `feedback/`.
        bounds: The limits.
        clock: Seconds, for the quotas.
    """

    def __init__(self, place: str, bounds: config.FeedbackConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._place, self._bounds, self._clock = place, bounds, clock
        self._quotas: OrderedDict[str, tuple[TokenBucket, TokenBucket]] = OrderedDict()

    @property
    def max_bytes(self) -> int:
        """Size of the largest request."""
        return self._bounds.max_bytes

    async def keep(self, opinion: FeedbackRequest, caller: str) -> str:
        """Writes one record and returns its URI.

        Args:
            opinion: The client's request.
            caller: Its hashed key; "" if the endpoint has no keys.

        Raises:
            RequestError: 403 for another key's answer, 429 if the key's quota is used up.
            StorageError: The record cannot be written.
        """
        if not is_answer_of(opinion.id, caller):
            raise RequestError(
                403, "id does not belong to an answer to this API key", param="id", code="not_your_answer"
            )
        folder, line = _record(opinion, caller)
        self._charge(caller, len(line))
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}.jsonl"
        uri = storage.join(self._place, "feedback", folder, name)
        await asyncio.to_thread(storage.write_bytes, uri, line, private=True)
        return uri

    def _charge(self, caller: str, num_bytes: int) -> None:
        now = self._clock()
        if caller not in self._quotas:
            bounds = (self._bounds.records_per_day, self._bounds.bytes_per_day)
            records, size = (TokenBucket(bound, _DAY_S, now) for bound in bounds)
            self._quotas[caller] = (records, size)
            if len(self._quotas) > _MAX_CALLERS:
                self._quotas.popitem(last=False)
        records, size = self._quotas[caller]
        for bucket, amount, what in ((records, 1, "records_per_day"), (size, num_bytes, "bytes_per_day")):
            if (wait_s := bucket.wait_s(min(amount, bucket.capacity), now)) > 0:
                message = f"this key's feedback is used up (serve.feedback.{what}: {bucket.capacity:.0f}); retry later"
                raise RequestError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
        records.take(1)
        size.take(num_bytes)


def _record(opinion: FeedbackRequest, caller: str) -> tuple[str, bytes]:
    """The folder of a record, and the record as a line."""
    messages = [message.turn() for message in opinion.messages]
    if opinion.correction is not None:
        messages[-1] = {"role": "assistant", "content": opinion.correction}
    what = opinion.model_dump(include={"rating", "comment", "model", "id"}, exclude_none=True)
    time_utc = datetime.now(UTC).isoformat(timespec="seconds")
    tools: dict[str, object] = {"tools": [tool.raw for tool in opinion.tools]} if opinion.tools else {}
    record: dict[str, object] = {
        "messages": messages,
        **tools,
        "metadata": {"feedback": {**what, "key": key_id(caller), "time": time_utc}},
    }
    folder = "up" if opinion.rating == "up" or opinion.correction is not None else "down"
    return folder, json.dumps(record, ensure_ascii=False).encode() + b"\n"
