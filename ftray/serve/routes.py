"""The HTTP side of a replica: OpenAI's routes around an engine, as an ASGI app.

Knows nothing of Ray, torch or transformers: any `Engine` works, and tests bring their own. It logs no prompts and no answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ftray import config
from ftray.engine.protocol import ContextLengthError, Engine, EngineError, OutputStream, SamplingParams, SchemaError
from ftray.errors import DataError, StorageError
from ftray.serve.adapter_cache import AdapterCache, ServedModels
from ftray.serve.answers import AnswerChunk, read_answer, read_text
from ftray.serve.asgi import (
    ErrorMiddleware,
    StreamedResponse,
    on_http_error,
    on_request_error,
    read_body,
    unavailable,
    with_cors,
)
from ftray.serve.auth import CALLER, AuthMiddleware, answer_id
from ftray.serve.autoscaling import TtftWindow
from ftray.serve.chat_prompts import ChatEncoder, ChatPrompt
from ftray.serve.drift import DriftMonitor, RequestSample, scripts_of
from ftray.serve.feedback import FeedbackBox
from ftray.serve.metrics import CONTENT_TYPE, ServeMetrics
from ftray.serve.openai import RequestError, read_object, validate
from ftray.serve.openai_answers import AnswerFrame, ChatFrame, CompletionFrame, ModelCard, ModelList
from ftray.serve.openai_requests import ChatRequest, CompletionRequest, FeedbackRequest, ModelRequest, parse_request
from ftray.serve.pages import page_routes
from ftray.serve.rate_limit import RateLimiter, RateLimits
from ftray.serve.responses_answers import ResponsesFrame
from ftray.serve.responses_requests import read_responses_request
from ftray.serve.routing import ALIAS, Router
from ftray.serve.sampling import sampling_params, token_speller
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
    cors_origins: Sequence[str] = (),
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
        cors_origins: Origins of web pages that may call the endpoint; `*` for all.
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

    app = AuthMiddleware(_starlette(api, lifespan, keeps_feedback=box is not None), key_hashes)
    return with_cors(app, cors_origins) if cors_origins else app


def _starlette(api: _Routes, lifespan: Callable[[Starlette], Any], *, keeps_feedback: bool) -> Starlette:
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/responses", api.responses, methods=["POST"]),
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


async def _beside(size: int, work: Callable[..., Any], *args: Any) -> Any:
    """work(*args), in a thread unless the text is short: its time grows with the text, and streams must not wait."""
    return work(*args) if size < SHORT else await asyncio.to_thread(work, *args)


@dataclass(frozen=True)
class _Question:
    """A request that has been read.

    Attributes:
        prompts: Ids of each prompt.
        params: Of each answer; those to the first prompt come first.
        read: An engine's stream and the number of its prompt → the pieces of the answer.
        constraint: The field that constrains the answers.
    """

    body: ModelRequest
    prompts: list[list[int]]
    params: list[SamplingParams]
    read: Callable[[OutputStream, int], AsyncGenerator[AnswerChunk, None]]
    frame: AnswerFrame
    constraint: str = "response_format"

    def numbered(self) -> list[tuple[SamplingParams, int]]:
        """The parameters of each answer, and the number of its prompt."""
        return [(params, i * len(self.prompts) // len(self.params)) for i, params in enumerate(self.params)]


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
        self._chats = ChatEncoder(engine.tokenizer) if has_template else None
        self._token_bytes = token_speller(engine.tokenizer)
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
        frame = ChatFrame(model_id, answer_id("chatcmpl", caller), self._token_bytes, body.include_usage)
        return await self._answer_chat(body, model_id, frame, stats, caller)

    async def responses(self, request: Request) -> Response:
        stats, caller = self._admit(request)
        raw = read_object(await read_body(request))
        responses_request, body = read_responses_request(raw, max_tokens=self._max_tokens)
        model_id = self._route(body)
        frame = ResponsesFrame(answer_id("resp", caller), model_id, responses_request)
        return await self._answer_chat(body, model_id, frame, stats, caller)

    async def _answer_chat(
        self, body: ChatRequest, model_id: str, frame: AnswerFrame, stats: RequestStats, caller: str
    ) -> Response:
        if self._chats is None:
            message = f"the model {model_id} has no chat template; use /v1/completions"
            raise RequestError(400, message, param="model")
        size = sum(len(message.text) for message in body.messages)
        prompt = await _beside(size, self._chats.encode, body)
        stats.scripts = await _beside(size, scripts_of, prompt.text)
        await self._check_constraint(prompt)
        params = self._sampling(body, len(prompt.ids), prompt)
        read = partial(read_answer, max_calls=prompt.max_calls, is_named=prompt.is_named)
        question = _Question(
            body, [prompt.ids], params, lambda stream, _: read(stream, prompt.new_parser()), frame, prompt.constraint
        )
        return await self._answer(question, model_id, stats, caller)

    async def completions(self, request: Request) -> Response:
        stats, caller = self._admit(request)
        body = parse_request(await read_body(request), CompletionRequest, max_tokens=self._max_tokens)
        model_id = self._route(body)
        text = "\n".join(prompt for prompt in body.prompts if isinstance(prompt, str))
        prompts = [await self._prompt_ids(prompt) for prompt in body.prompts]
        stats.scripts = await _beside(len(text), scripts_of, text)
        echoes = [self._echo(prompt) if body.echo else "" for prompt in body.prompts]
        params = [each for ids in prompts for each in self._sampling(body, len(ids))]
        frame = CompletionFrame(model_id, answer_id("cmpl", caller), self._token_bytes, body.include_usage)
        return await self._answer(
            _Question(body, prompts, params, lambda stream, number: read_text(stream, echoes[number]), frame),
            model_id,
            stats,
            caller,
        )

    async def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        encode = partial(self._engine.tokenizer, add_special_tokens=False)
        return list((await _beside(len(prompt), encode, prompt))["input_ids"])

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self._engine.tokenizer.decode(prompt))

    async def _check_constraint(self, prompt: ChatPrompt) -> None:
        try:  # in a thread, like tokenizing
            if prompt.json_schema is not None:
                await asyncio.to_thread(self._engine.check_schema, prompt.json_schema)
            if prompt.grammar is not None:
                await asyncio.to_thread(self._engine.check_grammar, prompt.grammar)
        except SchemaError as err:
            raise RequestError(400, str(err), param=prompt.constraint) from None

    async def _answer(self, question: _Question, model_id: str, stats: RequestStats, caller: str) -> Response:
        body, where = question.body, "messages" if isinstance(question.body, ChatRequest) else "prompt"
        on_first, on_end = partial(self._first, model_id), partial(self._end, model_id, caller)
        stats.num_prompt_tokens = sum(map(len, question.prompts))
        try:
            adapter = await self._adapters.prepare(model_id)
            # Nothing may be awaited from here to the engine: the adapter is loaded now.
            streams = [
                question.read(self._engine.generate(uuid.uuid4().hex, question.prompts[n], params, adapter=adapter), n)
                for params, n in question.numbered()
            ]
        except ContextLengthError as err:
            raise RequestError(400, str(err), param=where, code="context_length_exceeded") from None
        except DataError as err:
            raise RequestError(400, str(err), param=getattr(err, "name", where)) from None
        except (EngineError, RequestError) as err:
            stats.status = 503 if isinstance(err, EngineError) else err.status
            self._record(model_id, stats)
            raise unavailable(err) if isinstance(err, EngineError) else err from err
        self._metrics.running.inc()
        answers = AnswerStream(
            streams,
            question.frame,
            stats,
            self._max_answer_s,
            body.num_logprobs is not None,
            question.constraint,
            self._end_ids,
            on_first,
            on_end,
        )
        return StreamedResponse(answers.stream if body.stream else answers.whole)

    def _sampling(
        self, body: ModelRequest, num_prompt_tokens: int, prompt: ChatPrompt | None = None
    ) -> list[SamplingParams]:
        left = self._engine.max_context - num_prompt_tokens
        # The default is cut to the free context; a number that the client asked for is not.
        return sampling_params(body, body.num_tokens_asked or max(1, min(self._max_tokens, left)), prompt)

    def _admit(self, request: Request) -> tuple[RequestStats, str]:
        caller = str(request.scope.get(CALLER, ""))
        self._limiter.admit(caller)
        return RequestStats(), caller

    def _route(self, body: ModelRequest) -> str:
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
