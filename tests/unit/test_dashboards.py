"""Grafana dashboards: what Grafana's own types and Prometheus' grammar take, and only figures that somebody tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from ftray.cluster.dashboards import dashboards
from ftray.report.ray_metrics import GAUGES, PREFIX
from ftray.serve.metrics import ServeMetrics

K8S = Path(__file__).parents[2] / "k8s"
OF_RAY = {  # (Ray 2.56) dashboard/modules/reporter/reporter_agent.py, serve/_private/router.py
    "ray_node_gpus_utilization",
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_serve_deployment_queued_queries",
}
QUERIES = [
    pytest.param(target["expr"], id=f"{name}-{panel['title']}-{target['refId']}")
    for name, tree in dashboards().items()
    for panel in tree["panels"]
    for target in panel["targets"]
]


def metrics_in(expr: Any) -> set[str]:
    """Names of the metrics that a parsed query reads."""
    return set(re.findall(r"\bray_\w+", str(expr)))


def served() -> set[str]:
    """What a replica tells, with one series of each."""
    meters = ServeMetrics()
    meters.answers.labels("m", "200").inc()
    meters.tokens.labels("m", "prompt").inc()
    for histogram in (meters.first_token, meters.answer, meters.prompt):
        histogram.labels("m").observe(1)
    meters.empty.labels("m").inc()
    meters.feedback.labels("m", "up").inc()
    return {PREFIX + sample.name for family in meters.collect() for sample in family.samples} | {
        f"{PREFIX}ftray_drift_{kind}" for kind in ("prompt_tokens", "scripts", "empty")
    }


@pytest.mark.parametrize("query", QUERIES)
def test_each_query_is_promql_over_figures_that_are_told(query: str) -> None:
    parsed = promql_parser.parse(query.replace("$__rate_interval", "1m"))
    known = {PREFIX + name for name in GAUGES} | served() | OF_RAY
    assert metrics_in(parsed)
    assert metrics_in(parsed) <= known


def test_each_figure_of_training_is_on_the_dashboard() -> None:
    shown = set().union(*(metrics_in(query.values[0]) for query in QUERIES))
    assert {PREFIX + name for name in GAUGES} - shown == {"ray_ftray_checkpoint_step"}


@pytest.mark.parametrize("name", dashboards())
def test_grafanas_types_take_them_whole_and_the_files_are_these(name: str) -> None:
    tree = dashboards()[name]
    again = json.loads(json.dumps(Dashboard.from_json(tree), cls=JSONEncoder))
    assert lost(tree, again) == []
    assert json.loads((K8S / "grafana" / f"{name}.json").read_text()) == tree
    boxes = [panel["gridPos"] for panel in tree["panels"]]
    cells = {(box["x"] + x, box["y"] + y) for box in boxes for x in range(box["w"]) for y in range(box["h"])}
    assert len(cells) == sum(box["w"] * box["h"] for box in boxes), "panels cover each other"
    assert len({panel["id"] for panel in tree["panels"]}) == len(boxes)


def lost(tree: Any, other: Any, path: str = "") -> list[str]:
    """Where what Grafana's types kept isn't what was given."""
    if isinstance(tree, dict):
        if not isinstance(other, dict):
            return [path]
        return [where for key, value in tree.items() for where in lost(value, other.get(key), f"{path}.{key}")]
    if isinstance(tree, list):
        if not isinstance(other, list) or len(other) != len(tree):
            return [path]
        return [where for n, value in enumerate(tree) for where in lost(value, other[n], f"{path}[{n}]")]
    return [] if tree == other else [path]


def test_a_misspelled_key_is_caught() -> None:
    tree = dashboards()["training"]
    tree["panels"][0]["titel"] = "Loss"
    again = json.loads(json.dumps(Dashboard.from_json(tree), cls=JSONEncoder))
    assert lost(tree, again) == [".panels[0].titel"]
