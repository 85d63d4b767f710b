"""Each patch of `ftray/compat/deepspeed.py` is needed still; the test that fails says which one can go."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from ftray.compat.ray_jobs import cluster_version

START = """
import os, sys, tempfile
import torch.distributed as dist
if sys.argv[1] == "patched":
    from ftray.compat.deepspeed import without_compiler
    without_compiler()
import deepspeed
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
print("started")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["patched", "as it is"])
def test_deepspeed_starts_on_cpu_without_a_compiler_only_when_patched(how: str, tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = subprocess.run(
        [sys.executable, "-c", START, how], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    if how == "patched":
        assert done.returncode == 0, done.stderr[-2000:]
        assert "started" in done.stdout
    else:
        assert done.returncode != 0, "DeepSpeed starts without a compiler by itself: remove without_compiler"


def test_the_job_client_knows_the_version_of_its_cluster() -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": "4", "ray_version": "9.8.7", "ray_commit": "c", "session_name": "s"}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = JobSubmissionClient(f"http://127.0.0.1:{server.server_port}")
        assert cluster_version(client) == "9.8.7"
        server.shutdown()
