"""The page over HTTP, on this machine unless asked otherwise. Knows the sheet and answers; has never seen the key's sides.

Everything is below an address that holds the sheet's token: who doesn't know it, another user of the machine or a page
in the same browser, can neither read nor answer.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from ftray.errors import ConfigError, FtrayError
from ftray.evaluate.human.answers import RatingStore, check_name, parse_answer
from ftray.evaluate.human.sheet import Sheet
from ftray.signals import stop_event

MAX_BODY_BYTES = 64 * 1024
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def build_page(sheet: Sheet, answers: RatingStore, token: str) -> Starlette:
    """An ASGI app: the page, the sheet with one rater's answers, and a place to put each answer."""
    page = {name: (files(__package__) / "static" / f"page.{name}").read_bytes() for name in _KINDS}

    def file(name: str) -> Any:
        return lambda _: Response(page[name], media_type=_KINDS[name], headers=_HEADERS)

    async def get(request: Request) -> Response:
        rater = _rater(request)
        given = {str(n): a.model_dump(exclude_defaults=True) for n, a in answers.of(rater).items()}
        tree = {"criteria": sheet.criteria, "samples": [asdict(s) for s in sheet.samples], "answers": given}
        return JSONResponse(tree, headers=_HEADERS)

    async def put(request: Request) -> Response:
        rater = _rater(request)
        try:
            answer = {request.path_params["number"]: parse_answer(await _read_body(request))}
            await asyncio.to_thread(answers.save, rater, answer)
        except FtrayError as err:
            status = 400 if isinstance(err, ConfigError) else 503  # a store that is down: the page tries again
            raise HTTPException(status, str(err), _HEADERS) from None
        return Response(status_code=204, headers=_HEADERS)

    inside = [
        Route("/", file("html")),
        Route("/page.css", file("css")),
        Route("/page.js", file("js")),
        Route("/sheet", get),
        Route("/answers/{number:int}", put, methods=["PUT"]),
    ]
    return Starlette(routes=[Mount(f"/{token}", routes=inside)])


def _rater(request: Request) -> str:
    rater = request.query_params.get("rater", "")
    try:
        check_name(rater)
    except ConfigError as err:
        raise HTTPException(400, str(err), _HEADERS) from None
    return rater


async def _read_body(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"an answer has at most {MAX_BODY_BYTES} bytes", _HEADERS)
    return body


@contextmanager
def serving(app: Starlette, token: str, host: str, port: int) -> Iterator[str]:
    """Serves the page while inside; gives its address. port 0 takes a free one. Raises ConfigError if it is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family)
    except OSError as err:
        raise ConfigError(
            f"--host {host} --port {port} can't be listened on ({err.strerror or err}); give another --port, or 0"
        ) from None
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, args=([sock],), name="ftray-human", daemon=True)
    thread.start()
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host  # nosec B104 # compared, not bound
    try:
        yield f"http://{f'[{shown}]' if ':' in shown else shown}:{sock.getsockname()[1]}/{token}/"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


def wait_for_signal() -> None:
    """Returns at Ctrl-C, SIGTERM or SIGHUP. Main thread only."""
    with stop_event() as event:
        while not event.wait(timeout=0.5):  # in steps, so that Python can run signal handlers
            pass
