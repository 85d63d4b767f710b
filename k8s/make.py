"""Writes what `ftray k8s render` gives into k8s/base and the overlays: run it after a change of k8s/demo.yaml.

python k8s/make.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftray import config
from ftray.cluster.dashboards import dashboards
from ftray.cluster.render import ACCESS_PARTS, PARTS, as_yaml, render

HERE = Path(__file__).parent
ROLE = "arn:aws:iam::111122223333:role/ftray-demo"  # reads the data, reads and writes below the run: docs/clusters.md
RETRAIN = "ftray run /etc/ftray/run.yaml name=demo-$(date -u +%G-%V)"  # a run a week; a retry in that week continues it


def made() -> dict[Path, str]:
    """Text of each file that is rendered, by its path."""
    demo = config.load_run(HERE / "demo.yaml")
    rendered = render(demo, parts=PARTS, role_arn=ROLE)
    files = {HERE / "base" / f"{part}.yaml": as_yaml(tree) for part, tree in rendered.items()}
    big = config.load_run(HERE.parent / "jobs" / "full-8b.yaml", ["name=demo"])
    for part, tree in render(big, parts=tuple(part for part in PARTS if part not in ACCESS_PARTS)).items():
        files[HERE / "overlays" / "gpu-a100" / f"{part}.yaml"] = as_yaml(_patch(part, tree))
    job = render(demo, parts=("rayjob",))["rayjob"]
    files[HERE / "overlays" / "retrain" / "raycronjob.yaml"] = as_yaml(_cron(job))
    charts = {f"{name}.json": json.dumps(tree, indent=1) + "\n" for name, tree in dashboards().items()}
    files |= {HERE / "grafana" / name: text for name, text in charts.items()}
    labels = {"app.kubernetes.io/part-of": "ftray", "grafana_dashboard": "1"}  # by which Grafana's sidecar finds them
    meta = {"name": "ftray-dashboards", "labels": labels}
    tree = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": charts}
    files[HERE / "base" / "dashboards.yaml"] = as_yaml(tree)
    return files


def _patch(part: str, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """A JSON patch that replaces what depends on the run: its file and its machines."""
    where = "/data" if part == "configmap" else "/spec"
    return [
        {"op": "replace", "path": "/metadata/annotations", "value": tree["metadata"]["annotations"]},
        {"op": "replace", "path": where, "value": tree[where.strip("/")]},
    ]


def _cron(job: dict[str, Any]) -> dict[str, Any]:
    spec = dict(job["spec"], entrypoint=RETRAIN)
    spec["metadata"] = {"run": "demo"}
    meta = {"name": "demo-retrain", "labels": job["metadata"]["labels"]}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": meta,
        "spec": {"schedule": "0 3 * * 1", "timeZone": "Etc/UTC", "jobTemplate": spec},
    }


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent))
