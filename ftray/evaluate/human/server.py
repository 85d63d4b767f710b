"""Serves the rating page over HTTP, by default on this machine only. Gets the sheet and answers, never the sides of the key.

All paths start with the sheet's token. Without it, other users of the machine and other pages in the same browser can neither
read nor answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from ftray import config, storage
from ftray.console import Console
from ftray.errors import ConfigError, FtrayError
from ftray.evaluate.human.answers import RatingStore, check_name, from_csv, parse_answer, to_csv
from ftray.evaluate.human.results import as_text, results_of
from ftray.evaluate.human.sheet import Sheet, SheetKey, directory_of, open_sheet, read_sheet
from ftray.signals import stop_event


@dataclass(frozen=True)
class HumanEvalOptions:
    """Options of the command.

    Attributes:
        csv: Write the sheet to this CSV file.
        filled: Import this filled CSV file.
        results: Only print the results.
        host: Address of the page.
        port: Port of the page; 0: a free one.
    """

    csv: str | None = None
    filled: str | None = None
    results: bool = False
    host: str = "127.0.0.1"
    port: int = 8100


def human(run: config.RunConfig, options: HumanEvalOptions, console: Console) -> None:
    """Lets people compare a run's answers, blinded; prints the results and writes evaluate/human/results.json.

    Raises:
        ConfigError: There are no answers, ratings of another sheet, or an invalid CSV file.
        RunHeldError: Another process serves or imports ratings of this run.
        StorageError: The run cannot be read or written.
    """
    run_dir = storage.absolute(run.directory)
    directory = directory_of(run_dir)
    if options.results:
        _report(run_dir, *_known_sheet(run_dir), console)
        return
    if options.csv is not None:
        _write_csv(open_sheet(run_dir, run.evaluate.human)[0], storage.absolute(options.csv), console)
        return
    with storage.acquire_lease(directory):  # two processes would overwrite each other's answers
        if options.filled is not None:
            sheet, key = _known_sheet(run_dir)
            _read_csv(sheet, directory, options.filled, console)
        else:
            sheet, key = open_sheet(run_dir, run.evaluate.human)
            _serve(run, sheet, key, directory, options, console)
        _report(run_dir, sheet, key, console)


def _known_sheet(run_dir: str) -> tuple[Sheet, SheetKey]:
    if (sheet := read_sheet(run_dir)) is None:
        raise ConfigError(f"{directory_of(run_dir)} has no sheet yet; run `ftray evaluate human` on it first")
    return sheet


def _write_csv(sheet: Sheet, uri: str, console: Console) -> None:
    data = to_csv(sheet)
    if not storage.create_bytes(uri, data, private=True) and storage.read_bytes(uri) != data:
        raise ConfigError(f"{uri} already exists and may contain answers; use another name")
    console.say(
        f"wrote {len(sheet.samples)} samples to {uri}: fill in rater, preferred (A, B or same) and scores (1 to 5), "
        "then import it with --import"
    )


def _read_csv(sheet: Sheet, directory: str, file: str, console: Console) -> None:
    by_rater = from_csv(storage.read_bytes(storage.absolute(file)), sheet, file)
    answers = RatingStore(directory, sheet)
    for rater, ratings in by_rater.items():
        answers.save(rater, ratings)
        console.say(f"{len(ratings)} answers by {rater}")


def _serve(
    run: config.RunConfig, sheet: Sheet, key: SheetKey, directory: str, options: HumanEvalOptions, console: Console
) -> None:

    app = build_page(sheet, RatingStore(directory, sheet), key.token)
    with serving(app, key.token, options.host, options.port) as address:
        wanted = run.evaluate.human.samples
        few = f" (of {wanted}: there are no more answers; increase evaluate.num_generations)"
        console.say(f"{len(sheet.samples)} samples{few if len(sheet.samples) < wanted else ''}, {_describe(key)}")
        console.say(f"open {address}  (each rater enters a name; Ctrl-C ends and prints the results)")
        wait_for_signal()


def _describe(key: SheetKey) -> str:
    num_slices = len({name for name in key.slices if name})
    sides = f"the tuned model's answer is on side A in {key.tuned.count('a')}"
    return f"{sides}, {num_slices} slices" if num_slices else sides


def _report(run_dir: str, sheet: Sheet, key: SheetKey, console: Console) -> None:
    results = results_of(sheet, key, RatingStore(directory_of(run_dir), sheet).by_rater)
    uri = storage.join(directory_of(run_dir), "results.json")
    storage.write_bytes(uri, json.dumps(asdict(results), ensure_ascii=False, indent=1).encode())
    for line in [*as_text(results), f"written to {uri}"]:
        console.say(line)


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
    """An ASGI app: the page, the sheet with one rater's answers, and a route to store each answer."""
    page = {name: (files(__package__) / "static" / f"page.{name}").read_bytes() for name in _KINDS}

    def file(name: str) -> Any:
        return lambda _: Response(page[name], media_type=_KINDS[name], headers=_HEADERS)

    async def get(request: Request) -> Response:
        rater = _rater(request)
        ratings = {str(n): a.model_dump(exclude_defaults=True) for n, a in answers.of(rater).items()}
        tree = {"criteria": sheet.criteria, "samples": [asdict(s) for s in sheet.samples], "answers": ratings}
        return JSONResponse(tree, headers=_HEADERS)

    async def put(request: Request) -> Response:
        rater = _rater(request)
        try:
            answer = {request.path_params["number"]: parse_answer(await _read_body(request))}
            await asyncio.to_thread(answers.save, rater, answer)
        except FtrayError as err:
            status = 400 if isinstance(err, ConfigError) else 503  # storage is down: the page retries
            raise HTTPException(status, str(err), _HEADERS) from None
        return Response(status_code=204, headers=_HEADERS)

    routes = [
        Route("/", file("html")),
        Route("/page.css", file("css")),
        Route("/page.js", file("js")),
        Route("/sheet", get),
        Route("/answers/{number:int}", put, methods=["PUT"]),
    ]
    return Starlette(routes=[Mount(f"/{token}", routes=routes)])


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
    """Serves the page inside the context and yields its address. Port 0 selects a free port.

    Raises:
        ConfigError: The address or port is not available.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family)
    except OSError as err:
        raise ConfigError(
            f"--host {host} --port {port} is not available ({err.strerror or err}); use another --port, or 0"
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
    """Blocks until Ctrl-C, SIGTERM or SIGHUP. Main thread only."""
    with stop_event() as event:
        while not event.wait(timeout=0.5):  # in steps, so that Python can run signal handlers
            pass
