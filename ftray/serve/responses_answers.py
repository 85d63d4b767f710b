"""The answers of /v1/responses: a response object of items, or the events that build it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftray.chat.parsers.answer import Delta
from ftray.engine.protocol import TokenLogprob
from ftray.serve.answers import AnswerChunk, AnswerEnd
from ftray.serve.openai import encode_json
from ftray.serve.openai_answers import Usage, WholeAnswer, call_id
from ftray.serve.responses_requests import ResponsesRequest

Event = dict[str, Any]
# Of each kind of item with text: the name of its events, and their other fields.
_TEXT_EVENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "message": ("output_text", {"logprobs": []}),
    "reasoning": ("reasoning_text", {}),
}


@dataclass
class ResponsesFrame:
    """An `AnswerFrame`. A new one for each response, because its events are numbered.

    Attributes:
        id: Of the response.
        model: The model that answers.
        request: The client's request, parts of which a response repeats.
        items: The output so far.
    """

    id: str
    model: str
    request: ResponsesRequest
    created_at: int = field(default_factory=lambda: int(time.time()))
    items: list[dict[str, Any]] = field(default_factory=list)
    done: bytes = b""
    _number: int = 0
    _end: AnswerEnd = "stop"

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> dict[str, Any]:
        (answer,) = answers
        parts = answer.parts
        deltas = [Delta("reasoning", parts.reasoning)] if parts.reasoning else []
        deltas += [Delta("content", parts.content)] if parts.content else []
        for number, (name, arguments) in enumerate(parts.calls):
            deltas += [Delta("call", name, number), Delta("arguments", arguments, number)]
        self.chunk(0, AnswerChunk(deltas, answer.finish_reason, 0), None)
        return self._response(usage)

    def begin(self, num_answers: int) -> list[Event]:  # noqa: ARG002
        return [self._event(kind, response=self._response(None)) for kind in ("created", "in_progress")]

    def chunk(self, index: int, chunk: AnswerChunk, logprobs: Sequence[TokenLogprob] | None) -> list[Event]:  # noqa: ARG002
        events: list[Event] = []
        for delta in chunk.deltas:
            events += self._add(delta)
        if chunk.finish_reason is not None:
            self._end = chunk.finish_reason
            events += self._close()
        return events

    def end(self, usage: Usage) -> list[Event]:
        response = self._response(usage)
        return [self._event(response["status"], response=response)]

    def encode(self, event: Event) -> bytes:
        return b"event: " + str(event["type"]).encode() + b"\ndata: " + encode_json(event) + b"\n\n"

    def _add(self, delta: Delta) -> list[Event]:
        kind = {"reasoning": "reasoning", "content": "message"}.get(delta.kind, "function_call")
        events: list[Event] = []
        if delta.kind == "call" or not self.items or self.items[-1]["type"] != kind or self._is_closed:
            events += [*self._close(), *self._open(kind, delta)]
        item, where = self.items[-1], {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        if delta.kind == "arguments":
            item["arguments"] += delta.text
            events.append(self._event("function_call_arguments.delta", delta=delta.text, **where))
        elif delta.kind != "call":
            item["content"][0]["text"] += delta.text
            name, more = _TEXT_EVENTS[kind]
            events.append(self._event(f"{name}.delta", delta=delta.text, content_index=0, **more, **where))
        return events

    @property
    def _is_closed(self) -> bool:
        return not self.items or self.items[-1]["status"] != "in_progress"

    def _open(self, kind: str, delta: Delta) -> list[Event]:
        item: dict[str, Any] = {"id": f"{kind[:4]}_{call_id()}", "type": kind, "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": call_id(), "name": delta.text, "arguments": ""}
        elif kind == "message":
            item |= {"role": "assistant", "content": [{"type": "output_text", "text": "", "annotations": []}]}
        else:
            item |= {"summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
        self.items.append(item)
        index = len(self.items) - 1
        shown = {**item, "content": []} if "content" in item else dict(item)
        events = [self._event("output_item.added", item=shown, output_index=index)]
        if "content" in item:
            part = dict(item["content"][0])
            where = {"item_id": item["id"], "output_index": index, "content_index": 0}
            events.append(self._event("content_part.added", part=part, **where))
        return events

    def _close(self) -> list[Event]:
        """The last events of the item that is open."""
        if self._is_closed:
            return []
        item = self.items[-1]
        item["status"] = "incomplete" if self._end == "length" else "completed"
        where = {"item_id": item["id"], "output_index": len(self.items) - 1}
        events: list[Event] = []
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._event("function_call_arguments.done", **done, **where))
        else:
            part = item["content"][0]
            name, more = _TEXT_EVENTS[item["type"]]
            events.append(self._event(f"{name}.done", text=part["text"], content_index=0, **more, **where))
            events.append(self._event("content_part.done", part=dict(part), content_index=0, **where))
        events.append(self._event("output_item.done", item=dict(item), output_index=len(self.items) - 1))
        return events

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}

    def _response(self, usage: Usage | None) -> dict[str, Any]:
        """The response object: in progress without usage."""
        status = "in_progress" if usage is None else "incomplete" if self._end == "length" else "completed"
        repeated = self.request.model_dump(mode="json", by_alias=True, include={"text", "tool_choice", "tools"})
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": list(self.items),
            "instructions": self.request.instructions,
            "max_output_tokens": self.request.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": self.request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.request.reasoning.effort if self.request.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if self.request.temperature is None else self.request.temperature,
            "text": repeated["text"] or {"format": {"type": "text"}},
            "tool_choice": repeated["tool_choice"] or "auto",
            "tools": repeated["tools"] or [],
            "top_p": 1.0 if self.request.top_p is None else self.request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
