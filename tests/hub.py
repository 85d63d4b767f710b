"""A small hub: repositories of models in memory, over HTTP as huggingface_hub speaks it (regular files and LFS)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITES, READS = "hf_" + "w" * 34, "hf_" + "r" * 34  # a token that may write to acme/, one that may not


class Hub(ThreadingHTTPServer):
    """repos: name → {"private": …, "files": {path: bytes}, "commits": [summary]}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub for as long as the block lasts."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, tree: Any = None) -> None:
        data = json.dumps({} if tree is None else tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuses(self, to_write: bool) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITES, READS):
            self._answer(401, {"error": f"Invalid credentials: {token}"})  # repeats it, as careless servers do
        elif to_write and token == READS:
            self._answer(403, {"error": "You don't have the rights"})
        else:
            return False
        return True

    def do_GET(self) -> None:
        if self._refuses(to_write=False):
            return
        if self.path == "/api/whoami-v2":
            self._answer(200, {"name": "ann", "type": "user"})
            return
        found = re.match(r"/api/models/(\w+/[\w.-]+)/tree/main", self.path)
        if found and found[1] in self.server.repos:
            files = self.server.repos[found[1]]["files"]
            tree = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()]
            self._answer(200, tree)
            return
        found = re.match(r"/api/models/(\w+/[\w.-]+)", self.path)
        if found and found[1] in self.server.repos:
            self._answer(200, {"id": found[1], "sha": "0" * 40})
            return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        data = self._body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer(200)

    def do_POST(self) -> None:
        body = self._body()
        if self._refuses(to_write=True):
            return
        endpoint, repos = self.server.endpoint, self.server.repos
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            repos[name] = {"private": asked.get("visibility") == "private", "files": {}, "commits": []}
            self._answer(200, {"url": f"{endpoint}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if _is_large(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{endpoint}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.match(r"/api/models/(\w+/[\w.-]+)/commit/main", self.path):
            self._commit(repos[found[1]], [json.loads(line) for line in body.splitlines()])
            answer = {"commitUrl": f"{endpoint}/{found[1]}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
            self._answer(200, answer)
        else:
            self._answer(404)

    def _commit(self, repo: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo["commits"].append(value["summary"])
            elif line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf"))
