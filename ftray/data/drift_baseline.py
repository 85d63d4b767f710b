"""What an endpoint compares its requests with: a few figures of the training data, kept as `data/reference.json`.

Taken from the index's record tables; nothing is read a second time.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np

from ftray import storage
from ftray.data.index import Index, read_survey

NAME = "reference.json"
_TENTHS = range(10, 100, 10)


def write_reference(index: Index, directory: str) -> None:
    """Writes prompt_tokens, the nine deciles of prompts' lengths in tokens, and scripts, each one's share of letters.

    A prompt is what of a record is not learnt; letters are those of whole records. What is there for this index stays.
    """
    uri = storage.join(directory, NAME)
    if storage.exists(uri) and _hash_in(storage.read_bytes(uri)) == index.data_hash:
        return
    survey = read_survey(index, directory)
    lengths = survey.column("num_tokens") - survey.column("num_supervised")
    scripts = sum((Counter(summary.scripts) for summary in survey.summaries), Counter[str]())
    letters = max(1, scripts.total())
    reference = {
        "data_hash": index.data_hash,
        "prompt_tokens": [int(n) for n in np.percentile(lengths, _TENTHS, method="higher")] if len(lengths) else [],
        "scripts": {script: round(number / letters, 6) for script, number in scripts.most_common(20)},
    }
    storage.write_bytes(uri, json.dumps(reference).encode())


def _hash_in(text: bytes) -> object:
    try:
        return storage.parse_object(text).get("data_hash")
    except ValueError:
        return None
