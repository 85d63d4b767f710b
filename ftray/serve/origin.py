"""Where a served model comes from, as its run's directory tells: the id of its lineage, and what it was trained on.

Reads two small files; knows nothing of training, and what is not there is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ftray import storage
from ftray.errors import CheckpointError

logger = logging.getLogger(__name__)


def lineages_of(models: Mapping[str, str]) -> dict[str, str]:
    """Ids of the lineages that exported models, id → URI of what was committed, came with."""
    found = {}
    for name, uri in models.items():
        try:
            manifest = storage.read_manifest(uri)
        except CheckpointError:  # told where it is loaded
            continue
        if manifest is not None and manifest["meta"].get("lineage"):
            found[name] = str(manifest["meta"]["lineage"])
    return found


def reference_of(run_dir: str) -> dict[str, Any]:
    """Figures of what a run was trained on, for drift; none where it kept none, or where they are damaged."""
    uri = storage.join(run_dir, "data", "reference.json")  # data/reference.py writes it
    try:
        return _checked(storage.find_object(uri) or {})
    except (storage.DamagedFile, ValueError) as err:
        logger.warning("%s is damaged, so that no drift is told: %s", uri, err)
        return {}


def _checked(tree: dict[str, Any]) -> dict[str, Any]:
    lengths, scripts = tree.get("prompt_tokens", []), tree.get("scripts", {})
    if not isinstance(lengths, list) or not all(isinstance(n, int | float) for n in lengths):
        raise ValueError("prompt_tokens is no list of numbers")
    if not isinstance(scripts, dict) or not all(isinstance(n, int | float) for n in scripts.values()):
        raise ValueError("scripts maps no names to numbers")
    return tree
