"""Pages: a chat with two models side by side, and the API reference.

Their content security policy lets the browser contact only this endpoint.
"""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ftray.serve.openai import MAX_BODY_BYTES
from ftray.serve.openai_answers import ModelList
from ftray.serve.openai_requests import ChatRequest, CompletionRequest, FeedbackRequest
from ftray.serve.responses_requests import ResponsesRequest

_FILES = {
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes(keeps_feedback: bool) -> list[Route]:
    """Routes of the pages and of /openapi.json.

    Args:
        keeps_feedback: Whether the chat page offers to keep an opinion; without it, the endpoint refuses feedback.
    """
    templates = Environment(loader=PackageLoader("ftray.serve"), autoescape=True, undefined=StrictUndefined)
    chat = templates.get_template("chat.html").render(keeps_feedback=keeps_feedback).encode()
    routes = [Route("/", partial(_file, chat, "text/html; charset=utf-8"), methods=["GET"])]
    for path, (name, kind) in _FILES.items():
        body = (files("ftray.serve") / "static" / name).read_bytes()
        routes.append(Route(path, partial(_file, body, kind), methods=["GET"]))
    return [*routes, Route("/openapi.json", _openapi, methods=["GET"])]


async def _file(body: bytes, kind: str, _: Request) -> Response:
    return Response(body, headers={"content-type": kind, **_HEADERS})


async def _openapi(_: Request) -> Response:
    return JSONResponse(openapi())


def openapi() -> dict[str, Any]:
    """The API as an OpenAPI 3.1 document; bodies are those that requests are checked with."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    bodies: dict[str, tuple[type[BaseModel], str]] = {
        "/v1/chat/completions": (ChatRequest, "Answers a conversation; with stream: true as server-sent events"),
        "/v1/responses": (
            ResponsesRequest,
            "Answers a conversation, in the form of OpenAI's newer API; nothing is stored",
        ),
        "/v1/completions": (CompletionRequest, "Continues a text"),
        "/v1/feedback": (FeedbackRequest, "Keeps what a user thought of an answer, for the next training run"),
    }
    paths: dict[str, Any] = {}
    for path, (body, text) in bodies.items():
        created = "201" if body is FeedbackRequest else "200"
        kinds: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if created == "200":
            kinds["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _reference(body, schemas)}},
                },
                "responses": {
                    created: {"description": "done", "content": kinds},
                    **_errors(400, 401, 403, 404, 408, 413, 429, 431, 503),
                },
            }
        }
    models = {"application/json": {"schema": _reference(ModelList, schemas)}}
    paths["/v1/models"] = {"get": _get("Models that may be asked for", models)}
    one = {"application/json": {"schema": {"$ref": "#/components/schemas/ModelCard"}}}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths["/v1/models/{model}"] = {"get": {**_get("One of them", one, 404, 503), "parameters": [name]}}
    whole = {"application/json": {"schema": {"type": "object"}}}
    paths["/health"] = {"get": {**_get("Whether requests can be answered", whole, 503), "security": []}}
    paths["/metrics"] = {"get": _get("Figures for Prometheus", {"text/plain": {"schema": {"type": "string"}}})}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ftray", "version": "1", "description": f"Bodies hold at most {MAX_BODY_BYTES} bytes."},
        "paths": paths,
        "security": [{"key": []}],
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _get(text: str, content: dict[str, Any], *errors: int) -> dict[str, Any]:
    return {"summary": text, "responses": {"200": {"description": "done", "content": content}, **_errors(401, *errors)}}


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": "refused", "content": content} for status in statuses}


def _reference(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, str]:
    whole = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= whole.pop("$defs", {})
    schemas[model.__name__] = whole
    return {"$ref": f"#/components/schemas/{model.__name__}"}
