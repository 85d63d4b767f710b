"""What the server of forked processes has loaded: the libraries that take seconds to import."""

from __future__ import annotations

import os

os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"})
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray.data  # noqa: F401 - registers Ray's extension types with pyarrow, as every worker has them
import torch  # noqa: F401
import transformers  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

import ftray.chat
import ftray.cli.main
import ftray.data.preview
import ftray.model.load  # noqa: F401
