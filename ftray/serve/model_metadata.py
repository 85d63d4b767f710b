"""Where a served model comes from, as its run's directory tells: the id of its lineage, and what it was trained on.

Reads two small files; knows nothing of training, and what is not there is left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ftray import storage
from ftray.errors import CheckpointError
from ftray.serve.registry_schema import LINEAGE, Reference, first_error
from ftray.storage import strict_json

MAX_REFERENCE_BYTES = 64 << 10

logger = logging.getLogger(__name__)


def lineages_of(models: Mapping[str, str]) -> dict[str, str]:
    """Ids of the lineages that exported models, id → URI of what was committed, came with."""
    found = {}
    for name, uri in models.items():
        try:
            manifest = storage.read_manifest(uri)
        except CheckpointError:  # told where it is loaded
            continue
        meta = {} if manifest is None else manifest.get("meta")
        lineage = meta.get("lineage") if isinstance(meta, dict) else None
        if isinstance(lineage, str) and re.fullmatch(LINEAGE, lineage):
            found[name] = lineage
    return found


def reference_of(run_dir: str) -> dict[str, Any]:
    """Figures of what a run was trained on, for drift; none where it kept none, or where they are damaged."""
    uri = storage.join(run_dir, "data", "reference.json")  # data/prepare.py writes it
    if not storage.exists(uri):
        return {}
    try:
        tree = strict_json.parse(storage.read_range(uri, 0, MAX_REFERENCE_BYTES + 1), max_bytes=MAX_REFERENCE_BYTES)
        Reference.model_validate(tree)
    except ValidationError as err:
        logger.warning("%s is damaged, so drift is not reported: it %s", uri, first_error(err))
    except ValueError as err:
        logger.warning("%s is damaged, so drift is not reported: %s", uri, err)
    else:
        return dict(tree)
    return {}
