"""The HTTP side of one replica: OpenAI's routes around an engine, as an ASGI app.

Knows nothing of Ray, torch or transformers: any `Engine` will do, and tests may give one of their own. Logs no prompt
and no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ftray import config
from ftray.chat import ChatFormat, read_messages
from ftray.engine.protocol import ContextLengthError, Engine, EngineError, SamplingParams, SchemaError
from ftray.errors import DataError, StorageError
from ftray.serve.answers import Answers, Tally
from ftray.serve.asgi import Shield, Worked, on_http_error, on_request_error, read_body, unavailable
from ftray.serve.catalog import Catalog, Served
from ftray.serve.drift import Drift, Seen, scripts_of
from ftray.serve.feedback import FeedbackBox
from ftray.serve.keys import CALLER, KeyGuard
from ftray.serve.limits import Limits, Meter
from ftray.serve.meters import CONTENT_TYPE, Meters
from ftray.serve.pages import page_routes
from ftray.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    RequestError,
    parse_request,
    read_object,
    validate,
)
from ftray.serve.replies import ModelCard, ModelList, Reply
from ftray.serve.routing import ALIAS, Router
from ftray.serve.scaling import FirstTimes

SHORT = 2000  # characters that are tokenized sooner than a thread takes them up


def build_api(
    engine: Engine,
    served: Served,
    *,
    max_tokens: int,
    key_hashes: tuple[str, ...] = (),
    max_answer_s: float = 600.0,
    limits: Limits | None = None,
    router: Router | None = None,
    place: str | None = None,
    feedback: config.Feedback | None = None,
    first_times: FirstTimes | None = None,
    meters: Meters | None = None,
) -> Any:
    """An ASGI app that owns the engine: its lifespan starts and stops it.

    served: models and adapters. max_tokens: most that a request may ask for, and the default. max_answer_s: an answer
    that takes longer is ended with an error, so that a draining replica knows how long to wait. place: URI below which
    feedback is kept, within the bounds of `feedback`; where either is None, it is refused. first_times: told of each answer,
    for autoscaling. meters: what is counted.
    """
    meters, router = meters or Meters(), router or Router({})
    catalog = Catalog(engine, served, lambda rejected: meters.rejected.labels(rejected.kind).inc())
    box = FeedbackBox(place, feedback) if place is not None and feedback is not None else None
    api = _Api(engine, catalog, router, Meter(limits or Limits()), max_tokens, max_answer_s, box, first_times, meters)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await engine.start()
        try:
            await catalog.start()
            await router.start()
            yield
        finally:
            await router.stop()
            await catalog.stop()
            await engine.stop()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{model_id:path}", api.model, methods=["GET"]),
            Route("/v1/feedback", api.feedback, methods=["POST"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/metrics", api.metrics, methods=["GET"]),
            *page_routes(keeps_feedback=box is not None),
        ],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_error,
        },
        middleware=[Middleware(Shield)],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect has no body in OpenAI's shape
    return KeyGuard(app, key_hashes)


async def _beside(text: str, work: Callable[..., Any], *given: Any) -> Any:
    """work(*given), whose time goes with a text's length: in a thread, so that streams don't wait, unless it is short."""
    return work(*given) if len(text) < SHORT else await asyncio.to_thread(work, *given)


class _Api:
    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        router: Router,
        meter: Meter,
        max_tokens: int,
        max_answer_s: float,
        feedback_box: FeedbackBox | None,
        first_times: FirstTimes | None,
        meters: Meters,
    ) -> None:
        self._engine, self._catalog, self._router, self._meter = engine, catalog, router, meter
        self._created = int(time.time())
        self._max_tokens, self._max_answer_s, self._feedback_box = max_tokens, max_answer_s, feedback_box
        self._meters, self._first_times = meters, first_times or FirstTimes()
        self._meters.refresh = self._show_figures
        self._drift = Drift()
        has_template = getattr(engine.tokenizer, "chat_template", None)
        self._format = ChatFormat(engine.tokenizer) if has_template else None
        self._end_ids = frozenset(getattr(engine, "stop_token_ids", ()))

    async def health(self, _: Request) -> Response:
        try:
            self._engine.health()
        except EngineError as err:
            raise unavailable(err) from err
        return JSONResponse({"status": "ok"})

    def _show_figures(self) -> None:
        self._meters.models.set(len(self._model_ids()))
        for model_id in self._drift.models():
            self._meters.show_drift(model_id, self._drift.figures(model_id, self._catalog.reference(model_id)))

    async def metrics(self, _: Request) -> Response:
        return Response(self._meters.render(), headers={"content-type": CONTENT_TYPE})

    async def models(self, _: Request) -> Response:
        cards = [self._card(model_id) for model_id in self._model_ids()]
        return JSONResponse(ModelList(data=cards).model_dump())

    async def model(self, request: Request) -> Response:
        model_id = request.path_params["model_id"]
        self._check_model(model_id)
        return JSONResponse(self._card(model_id).model_dump())

    def _card(self, model_id: str) -> ModelCard:
        return ModelCard(id=model_id, created=self._created, lineage=self._catalog.lineage(model_id))

    async def feedback(self, request: Request) -> Response:
        caller = str(request.scope.get(CALLER, ""))
        self._meter.admit(caller)
        if self._feedback_box is None:
            raise RequestError(404, "this endpoint keeps no feedback: serve.feedback is not set")
        body = await read_body(request, self._feedback_box.max_bytes)
        opinion = validate(read_object(body), FeedbackRequest)
        try:
            await self._feedback_box.keep(opinion, caller)
        except StorageError as err:
            raise unavailable(err) from err
        known = opinion.model if opinion.model in self._model_ids() else "unknown"  # else a client could fill the label
        self._meters.feedback.labels(known, opinion.rating).inc()
        return JSONResponse({"object": "feedback", "stored": True}, status_code=201)

    async def chat(self, request: Request) -> Response:
        tally, caller = self._admit(request)
        asked = parse_request(await read_body(request), ChatRequest, max_tokens=self._max_tokens)
        model_id = self._route(asked)
        if asked.schema_text is not None:
            await self._check_schema(asked.schema_text)
        if self._format is None:
            message = f"the model {model_id} has no chat template; use /v1/completions"
            raise RequestError(400, message, param="model")
        try:
            messages = read_messages([message.turn() for message in asked.messages])
            text = "\n".join(message.content for message in messages)
            prompt_ids = await _beside(text, self._format.encode_prompt, messages)
            tally.scripts = await _beside(text, scripts_of, text)
        except DataError as err:
            raise RequestError(400, str(err), param="messages") from None
        return await self._answer(asked, model_id, prompt_ids, tally, caller)

    async def completions(self, request: Request) -> Response:
        tally, caller = self._admit(request)
        asked = parse_request(await read_body(request), CompletionRequest, max_tokens=self._max_tokens)
        model_id = self._route(asked)
        prompt = asked.prompt_or_ids
        if isinstance(prompt, str):
            encoded = await _beside(prompt, partial(self._engine.tokenizer, add_special_tokens=False), prompt)
            tally.scripts = await _beside(prompt, scripts_of, prompt)
            prompt = list(encoded["input_ids"])
        return await self._answer(asked, model_id, prompt, tally, caller)

    async def _check_schema(self, schema: str) -> None:
        try:  # in a thread, like tokenizing
            await asyncio.to_thread(self._engine.check_schema, schema)
        except SchemaError as err:
            raise RequestError(400, str(err), param="response_format") from None

    async def _answer(
        self, asked: ChatRequest | CompletionRequest, model_id: str, prompt_ids: list[int], tally: Tally, caller: str
    ) -> Response:
        chat = isinstance(asked, ChatRequest)
        on_first, on_end = partial(self._first, model_id), partial(self._end, model_id, caller)
        try:
            adapter = await self._catalog.prepare(model_id)
            # Nothing is awaited from here to the engine: the adapter is there now.
            streams = [
                self._engine.generate(uuid.uuid4().hex, prompt_ids, params, adapter=adapter)
                for params in self._sampling(asked, len(prompt_ids))
            ]
        except ContextLengthError as err:
            raise RequestError(
                400, str(err), param="messages" if chat else "prompt", code="context_length_exceeded"
            ) from None
        except DataError as err:
            raise RequestError(400, str(err), param="messages" if chat else "prompt") from None
        except (EngineError, RequestError) as err:
            tally.status = 503 if isinstance(err, EngineError) else err.status
            self._record(model_id, tally)
            raise unavailable(err) if isinstance(err, EngineError) else err from err
        self._meters.running.inc()
        reply = Reply.begin(chat=chat, model=model_id, spell=self._spell, caller=caller)
        has_logprobs = asked.num_logprobs is not None
        answers = Answers(streams, reply, tally, self._max_answer_s, has_logprobs, self._end_ids, on_first, on_end)
        return Worked(partial(answers.stream, asked.include_usage) if asked.stream else answers.whole)

    def _sampling(self, asked: ChatRequest | CompletionRequest, num_prompt_tokens: int) -> list[SamplingParams]:
        left = self._engine.max_context - num_prompt_tokens
        # What the client left to us is cut to what fits; what it asked for is not.
        max_tokens = asked.num_tokens_asked or max(1, min(self._max_tokens, left))
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                stop=asked.stops,
                seed=None if asked.seed is None else asked.seed + index,
                num_logprobs=asked.num_logprobs,
                json_schema=asked.schema_text,
            )
            for index in range(asked.n or 1)
        ]

    def _admit(self, request: Request) -> tuple[Tally, str]:
        caller = str(request.scope.get(CALLER, ""))
        self._meter.admit(caller)
        return Tally(), caller

    def _route(self, asked: ChatRequest | CompletionRequest) -> str:
        """The model that answers. Raises RequestError (404, or 503 when no model of `default` is there)."""
        if asked.model != ALIAS or not self._router.is_on:
            self._check_model(asked.model)
            return asked.model
        chosen = self._router.choose(asked.who, self._catalog.model_ids())
        if chosen is None:
            raise RequestError(503, "no model of `default` is available at the moment", code="model_unavailable")
        return chosen

    def _first(self, model_id: str, tally: Tally) -> None:
        """At once, not at the answer's end: a long stream would hide that it began late."""
        if tally.first_s is not None:
            self._meters.first_token.labels(model_id).observe(tally.first_s)
            self._first_times.add(tally.first_s)
            self._router.see_first(model_id, tally.first_s)

    def _end(self, model_id: str, caller: str, tally: Tally) -> None:
        self._meters.running.dec()
        self._meter.charge(caller, tally.usage.total_tokens)
        self._record(model_id, tally)

    def _record(self, model_id: str, tally: Tally) -> None:
        meters = self._meters
        meters.answers.labels(model_id, str(tally.status)).inc()
        meters.tokens.labels(model_id, "prompt").inc(tally.num_prompt_tokens)
        meters.tokens.labels(model_id, "completion").inc(tally.usage.completion_tokens)
        meters.prompt.labels(model_id).observe(tally.num_prompt_tokens)
        meters.answer.labels(model_id).observe(time.monotonic() - tally.began_s)
        if tally.status == 200:
            meters.empty.labels(model_id).inc(not tally.has_text)
            self._drift.add(model_id, Seen(tally.num_prompt_tokens, tally.scripts, not tally.has_text))
        # Who left, or read too slowly for the time there is, says nothing of the model; one that never began does.
        if tally.status != 499 and not (tally.is_late and tally.has_text):
            self._router.record(model_id, failed=tally.status >= 500)

    def _model_ids(self) -> list[str]:
        return [*([ALIAS] if self._router.is_on else []), *self._catalog.model_ids()]

    def _check_model(self, name: str) -> None:
        if name not in self._model_ids():
            if self._catalog.may_exist(name):
                raise RequestError(503, "the registry can't be read at the moment; try again", code="model_unavailable")
            raise RequestError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")

    def _spell(self, token_id: int) -> str:
        return str(self._engine.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
