"""The HTTP side of a replica: OpenAI's routes around an engine, as an ASGI app.

Knows nothing of Ray, torch or transformers: any `Engine` works, and tests bring their own. It logs no prompts and no answers.
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
from ftray.chat import ChatFormat, Conversation, read_messages
from ftray.engine.protocol import ContextLengthError, Engine, EngineError, SamplingParams, SchemaError
from ftray.errors import DataError, StorageError
from ftray.serve.adapter_cache import AdapterCache, ServedModels
from ftray.serve.asgi import ErrorMiddleware, StreamedResponse, on_http_error, on_request_error, read_body, unavailable
from ftray.serve.auth import CALLER, AuthMiddleware
from ftray.serve.autoscaling import TtftWindow
from ftray.serve.drift import DriftMonitor, RequestSample, scripts_of
from ftray.serve.feedback import FeedbackBox
from ftray.serve.metrics import CONTENT_TYPE, ServeMetrics
from ftray.serve.openai import (
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    RequestError,
    parse_request,
    read_object,
    validate,
)
from ftray.serve.openai_responses import ModelCard, ModelList, ResponseFrame
from ftray.serve.pages import page_routes
from ftray.serve.rate_limit import RateLimiter, RateLimits
from ftray.serve.routing import ALIAS, Router
from ftray.serve.streaming import AnswerStream, RequestStats

SHORT = 2000  # characters that are tokenized faster than a thread starts


def build_api(
    engine: Engine,
    served: ServedModels,
    *,
    max_tokens: int,
    key_hashes: tuple[str, ...] = (),
    max_answer_s: float = 600.0,
    limits: RateLimits | None = None,
    router: Router | None = None,
    place: str | None = None,
    feedback: config.FeedbackConfig | None = None,
    first_times: TtftWindow | None = None,
    metrics: ServeMetrics | None = None,
) -> Any:
    """An ASGI app that owns the engine: its lifespan starts and stops it.

    Args:
        engine: The engine.
        served: Models and adapters.
        max_tokens: The most that a request may ask for, and the default.
        key_hashes: SHA-256 hashes of the API keys; none: the endpoint is open.
        max_answer_s: An answer that takes longer ends with an error, so a draining replica knows how long to wait.
        limits: Rate limits per key.
        router: Chooses the model for requests to `default`.
        place: URI below which feedback is stored.
        feedback: Limits of feedback. Without it or `place`, feedback is refused.
        first_times: Collects times to first token, for autoscaling.
        metrics: The replica's metrics.
    """
    metrics, router = metrics or ServeMetrics(), router or Router({})
    adapters = AdapterCache(engine, served, lambda rejected: metrics.rejected.labels(rejected.kind).inc())
    box = FeedbackBox(place, feedback) if place is not None and feedback is not None else None
    api = _Routes(
        engine,
        adapters,
        router,
        RateLimiter(limits or RateLimits()),
        max_tokens,
        max_answer_s,
        box,
        first_times,
        metrics,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await engine.start()
        try:
            await adapters.start()
            await router.start()
            yield
        finally:
            await router.stop()
            await adapters.stop()
            await engine.stop()

    return AuthMiddleware(_starlette(api, lifespan, keeps_feedback=box is not None), key_hashes)


def _starlette(api: _Routes, lifespan: Callable[[Starlette], Any], *, keeps_feedback: bool) -> Starlette:
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{model_id:path}", api.model, methods=["GET"]),
            Route("/v1/feedback", api.feedback, methods=["POST"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/metrics", api.metrics, methods=["GET"]),
            *page_routes(keeps_feedback=keeps_feedback),
        ],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_error,
        },
        middleware=[Middleware(ErrorMiddleware)],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would not have OpenAI's error body
    return app


async def _beside(text: str, work: Callable[..., Any], *args: Any) -> Any:
    """work(*args), in a thread unless the text is short: its time grows with the text, and streams must not wait."""
    return work(*args) if len(text) < SHORT else await asyncio.to_thread(work, *args)


class _Routes:
    def __init__(
        self,
        engine: Engine,
        adapters: AdapterCache,
        router: Router,
        limiter: RateLimiter,
        max_tokens: int,
        max_answer_s: float,
        feedback_box: FeedbackBox | None,
        first_times: TtftWindow | None,
        metrics: ServeMetrics,
    ) -> None:
        self._engine, self._adapters, self._router, self._limiter = engine, adapters, router, limiter
        self._created = int(time.time())
        self._max_tokens, self._max_answer_s, self._feedback_box = max_tokens, max_answer_s, feedback_box
        self._metrics, self._first_times = metrics, first_times or TtftWindow()
        self._metrics.refresh = self._refresh_metrics
        self._drift = DriftMonitor()
        has_template = getattr(engine.tokenizer, "chat_template", None)
        self._format = ChatFormat(engine.tokenizer) if has_template else None
        self._end_ids = frozenset(getattr(engine, "stop_token_ids", ()))

    async def health(self, _: Request) -> Response:
        try:
            self._engine.health()
        except EngineError as err:
            raise unavailable(err) from err
        return JSONResponse({"status": "ok"})

    def _refresh_metrics(self) -> None:
        self._metrics.models.set(len(self._model_ids()))
        for model_id in self._drift.models():
            self._metrics.show_drift(model_id, self._drift.figures(model_id, self._adapters.reference(model_id)))

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def models(self, _: Request) -> Response:
        cards = [self._card(model_id) for model_id in self._model_ids()]
        return JSONResponse(ModelList(data=cards).model_dump())

    async def model(self, request: Request) -> Response:
        model_id = request.path_params["model_id"]
        self._check_model(model_id)
        return JSONResponse(self._card(model_id).model_dump())

    def _card(self, model_id: str) -> ModelCard:
        return ModelCard(id=model_id, created=self._created, lineage=self._adapters.lineage(model_id))

    async def feedback(self, request: Request) -> Response:
        caller = str(request.scope.get(CALLER, ""))
        self._limiter.admit(caller)
        if self._feedback_box is None:
            raise RequestError(404, "this endpoint stores no feedback: serve.feedback is not set")
        raw = await read_body(request, self._feedback_box.max_bytes)
        feedback_request = validate(read_object(raw), FeedbackRequest)
        try:
            await self._feedback_box.keep(feedback_request, caller)
        except StorageError as err:
            raise unavailable(err) from err
        known = (
            feedback_request.model if feedback_request.model in self._model_ids() else "unknown"
        )  # otherwise clients could create any number of labels
        self._metrics.feedback.labels(known, feedback_request.rating).inc()
        return JSONResponse({"object": "feedback", "stored": True}, status_code=201)

    async def chat(self, request: Request) -> Response:
        stats, caller = self._admit(request)
        body = parse_request(await read_body(request), ChatRequest, max_tokens=self._max_tokens)
        model_id = self._route(body)
        if body.schema_text is not None:
            await self._check_schema(body.schema_text)
        if self._format is None:
            message = f"the model {model_id} has no chat template; use /v1/completions"
            raise RequestError(400, message, param="model")
        try:
            messages = read_messages([message.turn() for message in body.messages])
            text = "\n".join(message.content for message in messages)
            prompt_ids = await _beside(text, self._format.encode_prompt, Conversation(messages))
            stats.scripts = await _beside(text, scripts_of, text)
        except DataError as err:
            raise RequestError(400, str(err), param="messages") from None
        return await self._answer(body, model_id, prompt_ids, stats, caller)

    async def completions(self, request: Request) -> Response:
        stats, caller = self._admit(request)
        body = parse_request(await read_body(request), CompletionRequest, max_tokens=self._max_tokens)
        model_id = self._route(body)
        prompt = body.prompt_or_ids
        if isinstance(prompt, str):
            encoded = await _beside(prompt, partial(self._engine.tokenizer, add_special_tokens=False), prompt)
            stats.scripts = await _beside(prompt, scripts_of, prompt)
            prompt = list(encoded["input_ids"])
        return await self._answer(body, model_id, prompt, stats, caller)

    async def _check_schema(self, schema: str) -> None:
        try:  # in a thread, like tokenizing
            await asyncio.to_thread(self._engine.check_schema, schema)
        except SchemaError as err:
            raise RequestError(400, str(err), param="response_format") from None

    async def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        model_id: str,
        prompt_ids: list[int],
        stats: RequestStats,
        caller: str,
    ) -> Response:
        chat = isinstance(body, ChatRequest)
        on_first, on_end = partial(self._first, model_id), partial(self._end, model_id, caller)
        try:
            adapter = await self._adapters.prepare(model_id)
            # Nothing may be awaited from here to the engine: the adapter is loaded now.
            streams = [
                self._engine.generate(uuid.uuid4().hex, prompt_ids, params, adapter=adapter)
                for params in self._sampling(body, len(prompt_ids))
            ]
        except ContextLengthError as err:
            raise RequestError(
                400, str(err), param="messages" if chat else "prompt", code="context_length_exceeded"
            ) from None
        except DataError as err:
            raise RequestError(400, str(err), param="messages" if chat else "prompt") from None
        except (EngineError, RequestError) as err:
            stats.status = 503 if isinstance(err, EngineError) else err.status
            self._record(model_id, stats)
            raise unavailable(err) if isinstance(err, EngineError) else err from err
        self._metrics.running.inc()
        reply = ResponseFrame.begin(chat=chat, model=model_id, spell=self._spell, caller=caller)
        has_logprobs = body.num_logprobs is not None
        answers = AnswerStream(streams, reply, stats, self._max_answer_s, has_logprobs, self._end_ids, on_first, on_end)
        return StreamedResponse(partial(answers.stream, body.include_usage) if body.stream else answers.whole)

    def _sampling(self, body: ChatRequest | CompletionRequest, num_prompt_tokens: int) -> list[SamplingParams]:
        left = self._engine.max_context - num_prompt_tokens
        # The default is cut to the free context; a number that the client asked for is not.
        max_tokens = body.num_tokens_asked or max(1, min(self._max_tokens, left))
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                stop=body.stops,
                seed=None if body.seed is None else body.seed + index,
                num_logprobs=body.num_logprobs,
                json_schema=body.schema_text,
            )
            for index in range(body.n or 1)
        ]

    def _admit(self, request: Request) -> tuple[RequestStats, str]:
        caller = str(request.scope.get(CALLER, ""))
        self._limiter.admit(caller)
        return RequestStats(), caller

    def _route(self, body: ChatRequest | CompletionRequest) -> str:
        """The model that answers. Raises RequestError: 404, or 503 if no model of `default` is available."""
        if body.model != ALIAS or not self._router.is_on:
            self._check_model(body.model)
            return body.model
        chosen = self._router.choose(body.who, self._adapters.model_ids())
        if chosen is None:
            raise RequestError(503, "no model of `default` is available at the moment", code="model_unavailable")
        return chosen

    def _first(self, model_id: str, stats: RequestStats) -> None:
        """Called at once, not at the end of the answer: a long stream would hide a late start."""
        if stats.first_s is not None:
            self._metrics.first_token.labels(model_id).observe(stats.first_s)
            self._first_times.add(stats.first_s)
            self._router.record_first_text(model_id, stats.first_s)

    def _end(self, model_id: str, caller: str, stats: RequestStats) -> None:
        self._metrics.running.dec()
        self._limiter.charge(caller, stats.usage.total_tokens)
        self._record(model_id, stats)

    def _record(self, model_id: str, stats: RequestStats) -> None:
        metrics = self._metrics
        metrics.answers.labels(model_id, str(stats.status)).inc()
        metrics.tokens.labels(model_id, "prompt").inc(stats.num_prompt_tokens)
        metrics.tokens.labels(model_id, "completion").inc(stats.usage.completion_tokens)
        metrics.prompt.labels(model_id).observe(stats.num_prompt_tokens)
        metrics.answer.labels(model_id).observe(time.monotonic() - stats.began_s)
        if stats.status == 200:
            metrics.empty.labels(model_id).inc(not stats.has_text)
            self._drift.add(model_id, RequestSample(stats.num_prompt_tokens, stats.scripts, not stats.has_text))
        # A client that left or read too slowly does not count against the model; an answer that never began does.
        if stats.status != 499 and not (stats.is_late and stats.has_text):
            self._router.record(model_id, failed=stats.status >= 500)

    def _model_ids(self) -> list[str]:
        return [*([ALIAS] if self._router.is_on else []), *self._adapters.model_ids()]

    def _check_model(self, name: str) -> None:
        if name not in self._model_ids():
            if self._adapters.may_exist(name):
                raise RequestError(
                    503, "the registry is not available at the moment; try again", code="model_unavailable"
                )
            raise RequestError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")

    def _spell(self, token_id: int) -> str:
        return str(self._engine.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
