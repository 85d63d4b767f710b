"""Both dashboards under a real Prometheus: each of their queries finds something while a run trains and a model answers.

Run by hand, where `prometheus` is installed: `python -m pytest tests/trials/test_prometheus.py`. What only a GPU or a fault
can show (MFU, memory of a GPU, alerts, errors) is named in `ABSENT`, and its query must be understood.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import ray

from ftray.cluster.dashboards import dashboards
from ftray.config import ServeConfig
from ftray.console import Console
from ftray.driver.launch import train
from ftray.driver.run_record import open_run
from ftray.report.ray_metrics import TrainingMetrics
from ftray.serve import proxy
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.run import start_endpoint
from tests import tiny
from tests.cluster import Watched, make_run, wait_for
from tests.ray.test_serve import endless_model
from tests.s3 import free_ports
from tests.unit.test_engine import byte_tokenizer

ABSENT = {
    ("training", "MFU"),
    ("training", "Alerts"),
    ("training", "Memory of rank 0's GPU"),
    ("training", "GPUs at work"),
    ("serving", "Errors"),
    ("serving", "Drift: length of prompts"),
    ("serving", "Drift: other scripts"),
    ("serving", "Drift: empty answers"),
    ("serving", "Feedback a second"),
}
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus"),
]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run that trains, an endpoint that answers, and a server that has read both; its URL."""
    root = tmp_path_factory.mktemp("prom")
    metrics_port, port = free_ports(2)
    settings = {"global": {"scrape_interval": "1s"}}
    jobs = [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}]
    (root / "prometheus.yml").write_text(json.dumps(settings | {"scrape_configs": jobs}))
    command = ["prometheus", f"--config.file={root}/prometheus.yml", f"--storage.tsdb.path={root}/tsdb"]
    server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in proxy.SETTINGS.items():
            patch.setenv(name, value)
        ray.init(
            address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, _metrics_export_port=metrics_port
        )
        try:
            _work(root)
            yield f"http://127.0.0.1:{port}"
        finally:
            ray.shutdown()
            server.terminate()
            server.wait(60)


def _work(root: Path) -> None:
    """Trains to the end, with some answers beside it."""
    model, data = tiny.write_tiny_model(root / "model"), tiny.write_records(root / "data", 400)
    run = make_run(root, model, data, train__max_steps=60, data__eval={"fraction": 0.1}, evaluate__every=10)
    gauges = TrainingMetrics(run)
    endless_model().save_pretrained(root / "served")
    byte_tokenizer().save_pretrained(root / "served")
    endpoint = start_endpoint(root / "served", ServedModels("tiny"), ServeConfig(port=0, max_tokens=1000), num_cpus=0.5)
    client = openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0, timeout=60)
    train(run, open_run(run), Console(Watched()), subscribers=[gauges])
    for _ in range(60):
        for part in client.completions.create(model="tiny", prompt="Hello there", max_tokens=40, stream=True):
            assert part.choices


def ask(url: str, query: str) -> list[Any]:
    for variable, value in (("$__rate_interval", "60s"), ("$run", ".*"), ("$model", ".*")):
        query = query.replace(variable, value)
    text = urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(f"{url}/api/v1/query?{text}", timeout=30) as answer:
        told = json.load(answer)
    assert told["status"] == "success", told
    found: list[Any] = told["data"]["result"]
    return found


QUERIES = [
    pytest.param(name, panel["title"], target["expr"], id=f"{name}-{panel['title']}-{target['refId']}")
    for name, tree in dashboards().items()
    for panel in tree["panels"]
    for target in panel["targets"]
]


@pytest.mark.parametrize(("name", "title", "query"), QUERIES)
def test_each_query_finds_something(prometheus: str, name: str, title: str, query: str) -> None:
    if (name, title) in ABSENT:
        assert ask(prometheus, query) == []
    else:
        wait_for(lambda: bool(ask(prometheus, query)), query)
