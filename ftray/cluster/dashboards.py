"""Grafana dashboards over what ftray tells Prometheus: training (observe.gauges) and serving (serve.meters).

Pure: trees in Grafana's JSON model. `k8s/make.py` writes them. Every figure comes through Ray, which puts `ray_` before it.
"""

from __future__ import annotations

from typing import Any

Tree = dict[str, Any]
SOURCE = {"type": "prometheus", "uid": "${source}"}
SCHEMA = 39  # of Grafana 10 and newer; newer ones migrate it
WIDTH, HEIGHT = 8, 8  # of a panel; a row has 24
_RUN = '{run=~"$run"}'
_ERRORS = ', status=~"5.."'
_MODEL = '{model=~"$model"}'


def _rate(name: str, label: str = "model", more: str = "") -> str:
    return f'sum by ({label}) (rate(ray_{name}{{model=~"$model"{more}}}[$__rate_interval]))'


def _quantile(name: str, share: float) -> str:
    buckets = f'rate(ray_{name}_bucket{{model=~"$model"}}[$__rate_interval])'
    return f"histogram_quantile({share}, sum by (le, model) ({buckets}))"


# (title, unit, what it says, [(query, legend)])
Panel = tuple[str, str, str, list[tuple[str, str]]]
TRAINING: list[Panel] = [
    (
        "Loss",
        "short",
        "Of the last step, and of the eval set.",
        [(f"ray_ftray_loss{_RUN}", "{{run}}"), (f"ray_ftray_eval_loss{_RUN}", "{{run}} eval")],
    ),
    (
        "Tokens a second",
        "short",
        "Of all workers; with padding as if rows were full.",
        [
            (f"ray_ftray_tokens_per_second{_RUN}", "{{run}}"),
            (f"ray_ftray_padded_tokens_per_second{_RUN}", "{{run}} with padding"),
        ],
    ),
    ("MFU", "percentunit", "Share of the cards' dense 16-bit rate.", [(f"ray_ftray_mfu{_RUN}", "{{run}}")]),
    (
        "Steps done",
        "percentunit",
        "Of those planned.",
        [(f"ray_ftray_step{_RUN} / ray_ftray_planned_steps{_RUN}", "{{run}}")],
    ),
    (
        "Wait for data",
        "percentunit",
        "Share of a step. Above 0.5% the data is too slow.",
        [(f"ray_ftray_data_wait_share{_RUN}", "{{run}}")],
    ),
    (
        "Goodput",
        "percentunit",
        "Share of the command's time in steps that count.",
        [(f"ray_ftray_goodput{_RUN}", "{{run}}")],
    ),
    (
        "Workers, and their restarts",
        "short",
        "Restarts are counted from the command's start.",
        [(f"ray_ftray_workers{_RUN}", "{{run}} workers"), (f"ray_ftray_restarts{_RUN}", "{{run}} restarts")],
    ),
    (
        "Age of the newest checkpoint",
        "s",
        "What a failure now would cost.",
        [(f"time() - ray_ftray_checkpoint_unix_seconds{_RUN}", "{{run}}")],
    ),
    (
        "Alerts",
        "short",
        "By kind; the run's log says what to do.",
        [(f"sum by (run, kind) (ray_ftray_alerts{_RUN})", "{{run}} {{kind}}")],
    ),
    ("Gradient norm", "short", "Before clipping.", [(f"ray_ftray_grad_norm{_RUN}", "{{run}}")]),
    ("Learning rate", "sci", "", [(f"ray_ftray_learning_rate{_RUN}", "{{run}}")]),
    (
        "Memory of rank 0's GPU",
        "gbytes",
        "The most that tensors took.",
        [(f"ray_ftray_peak_memory_gib{_RUN}", "{{run}}")],
    ),
    (
        "GPUs at work",
        "percent",
        "Of each node, by Ray.",
        [("avg by (instance) (ray_node_gpus_utilization)", "{{instance}}")],
    ),
    ("Nodes' memory", "bytes", "By Ray.", [("ray_node_mem_used", "{{instance}}")]),
    ("Nodes' processors at work", "percent", "By Ray.", [("ray_node_cpu_utilization", "{{instance}}")]),
]
SERVING: list[Panel] = [
    (
        "Answers a second",
        "reqps",
        "By status.",
        [(_rate("ftray_answers_total", "model, status"), "{{model}} {{status}}")],
    ),
    (
        "Errors",
        "percentunit",
        "Share of answers with a status of 500 and above.",
        [
            (
                f"{_rate('ftray_answers_total', more=_ERRORS)} / {_rate('ftray_answers_total')}",
                "{{model}}",
            )
        ],
    ),
    (
        "First text",
        "s",
        "From request to first text.",
        [
            (_quantile("ftray_first_token_seconds", 0.5), "{{model}} median"),
            (_quantile("ftray_first_token_seconds", 0.99), "{{model}} 99%"),
        ],
    ),
    (
        "Whole answers",
        "s",
        "From request to the end.",
        [
            (_quantile("ftray_answer_seconds", 0.5), "{{model}} median"),
            (_quantile("ftray_answer_seconds", 0.99), "{{model}} 99%"),
        ],
    ),
    (
        "Tokens a second",
        "short",
        "Read and written.",
        [(_rate("ftray_tokens_total", "model, kind"), "{{model}} {{kind}}")],
    ),
    ("Answers under way", "short", "Of each replica.", [("ray_ftray_answers_running", "{{replica}}")]),
    (
        "Requests in the queue",
        "short",
        "By Ray Serve: those that wait for a replica.",
        [("sum by (deployment) (ray_serve_deployment_queued_queries)", "{{deployment}}")],
    ),
    (
        "Replicas, models",
        "short",
        "Models and adapters that may be asked for.",
        [("count(ray_ftray_models)", "replicas"), ("max(ray_ftray_models)", "models")],
    ),
    ("Length of prompts", "short", "Tokens.", [(_quantile("ftray_prompt_tokens", 0.5), "{{model}} median")]),
    (
        "Drift: length of prompts",
        "short",
        "Stability index against training; above 0.25 it is another population.",
        [(f"max by (model) (ray_ftray_drift_prompt_tokens{_MODEL})", "{{model}}")],
    ),
    (
        "Drift: other scripts",
        "percentunit",
        "Share of letters in scripts that training hardly had.",
        [(f"max by (model) (ray_ftray_drift_scripts{_MODEL})", "{{model}}")],
    ),
    (
        "Drift: empty answers",
        "percentunit",
        "Of the last ones.",
        [(f"max by (model) (ray_ftray_drift_empty{_MODEL})", "{{model}}")],
    ),
    (
        "Feedback a second",
        "short",
        "Thumbs of users.",
        [(_rate("ftray_feedback_total", "model, rating"), "{{model}} {{rating}}")],
    ),
]


def dashboards() -> dict[str, Tree]:
    """Dashboards by name: `training`, `serving`."""
    return {
        "training": _dashboard("ftray training", TRAINING, "run", "label_values(ray_ftray_step, run)"),
        "serving": _dashboard("ftray serving", SERVING, "model", "label_values(ray_ftray_answers_total, model)"),
    }


def _dashboard(title: str, panels: list[Panel], variable: str, values: str) -> Tree:
    choice = {
        "name": variable,
        "type": "query",
        "datasource": SOURCE,
        "query": values,
        "refresh": 2,  # with the time range
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": title.replace(" ", "-"),
        "title": title,
        "tags": ["ftray"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}, choice]},
        "panels": [_panel(place, panel) for place, panel in enumerate(panels)],
    }


def _panel(place: int, panel: Panel) -> Tree:
    title, unit, text, queries = panel
    per_row = 24 // WIDTH
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": title,
        "description": text,
        "datasource": SOURCE,
        "gridPos": {"x": place % per_row * WIDTH, "y": place // per_row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for n, (query, legend) in enumerate(queries)
        ],
    }
