"""What Ray Serve imports where a configuration file deploys the endpoint (a KubeRay RayService): app from run file.

Knows the run file and the place of its exported model; nothing of clusters.
"""

from __future__ import annotations

from ray import serve

from ftray import config, storage
from ftray.serve.app import build_app
from ftray.serve.catalog import Served
from ftray.serve.keys import read_key_hashes


def build(args: dict[str, str]) -> serve.Application:
    """The application of the run file `args["run"]`; keys come from FTRAY_API_KEY. Raises ConfigError without one."""
    run = config.load_run(args["run"])
    parts = ("model",) if run.method.type == "full" else ("model", "merged")
    return build_app(
        storage.join(storage.absolute(run.directory), *parts),
        Served(run.name),
        run.serve,
        key_hashes=read_key_hashes("0.0.0.0"),  # whatever the file says: a pod is reached from others
        num_cpus=run.scale.cpus_per_worker,
        num_gpus=float(run.serve.tensor_parallel if run.scale.accelerator else 0),
    )
