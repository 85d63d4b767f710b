"""MLflow: a run of the server or store in MLFLOW_TRACKING_URI, else of a file store in `<run>/mlflow/`."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from ftray import config
from ftray.events.trackers.base import Segment, metric_values, tracker_id

BATCH = 1000  # metrics that one call of MLflow accepts


class MLflow:
    """Asks MLflow which steps it has of each metric, and logs those that follow."""

    def __init__(self, run: config.RunConfig, run_dir: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(run_dir, "mlflow").as_uri()
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ftray")
        experiment, mark = self._experiment(name), tracker_id(run_dir)
        runs = self._client.search_runs([experiment], f"tags.`ftray.run` = '{mark}'")
        if runs:
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {"ftray.run": mark, "mlflow.runName": run.name, "ftray.config_hash": run.config_hash}
            self._run_id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        # By metric: a command that was killed may have logged a part of a step.
        self._last = {key: self._last_step(key) for key in self._client.get_run(self._run_id).data.metrics}

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another trial of a sweep was faster
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _last_step(self, key: str) -> int:
        return max(metric.step for metric in self._client.get_metric_history(self._run_id, key))

    def update(self, segments: list[Segment]) -> None:
        """Logs what MLflow does not have yet."""
        from mlflow.entities import Metric

        last = dict(self._last)
        new = [
            Metric(key, value, int(line["unix_s"] * 1000), int(line["step"]))
            for line in itertools.chain.from_iterable(segments)
            for key, value in metric_values(line).items()
            if line["step"] > last.get(key, -1)
        ]
        for first in range(0, len(new), BATCH):
            self._client.log_batch(self._run_id, metrics=new[first : first + BATCH])
        self._last = last | {metric.key: metric.step for metric in new}

    def close(self, state: str) -> None:
        """Sets the run's status."""
        self._client.set_terminated(self._run_id, state)

    def abandon(self) -> None:
        """Nothing to do."""
