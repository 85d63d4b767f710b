"""The application that Ray Serve imports if a config file deploys the endpoint (a KubeRay RayService).

Knows the run file and the place of its exported model, but not clusters. Model, lineage, drift references and feedback are as
with
`ftray serve` and `serve.max_adapters: 0`.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from ray import serve

from ftray import config, storage
from ftray.errors import StorageError
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.app import build_app
from ftray.serve.auth import read_key_hashes
from ftray.serve.model_files import lineages_of, reference_of

logger = logging.getLogger(__name__)


def build(args: dict[str, str]) -> serve.Application:
    """The application of the run file `args["run"]`. Keys come from FTRAY_API_KEY. Raises ConfigError without one."""
    run = config.load_run(args["run"])
    run_dir = storage.absolute(run.directory)
    model_dir = storage.join(run_dir, "model")
    served = ServedModels(run.name)
    try:
        reference = reference_of(run_dir)
        served = replace(
            served, lineages=lineages_of({run.name: model_dir}), references={run.name: reference} if reference else {}
        )
    except StorageError as err:  # an endpoint is worth more than figures about it
        logger.warning("%s: served without its lineage and drift: %s", run.name, err)
    return build_app(
        model_dir if run.method.type == "full" else storage.join(model_dir, "merged"),
        served,
        run.serve,
        key_hashes=read_key_hashes("0.0.0.0"),  # whatever the file says: a pod is reached from others  # nosec B104 # a pod, behind keys and network policies
        num_cpus=run.scale.cpus_per_worker,
        num_gpus=float(run.serve.tensor_parallel if run.scale.accelerator else 0),
        place=run_dir,
    )
