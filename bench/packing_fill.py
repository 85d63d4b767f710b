"""How full packed rows are: share of tokens that are no padding, in one streaming pass, chunk by chunk (issue 3).

    python -m bench.packing_fill --mb 100 --gsm8k …/gsm8k/train.jsonl

Rows of 4096 tokens through the chat format; a chunk (`data.chunk_mb`, by default 4 MB) is the window that best fit
packs. Prints one JSON line for each set and chunk size, and what best fit costs for 100,000 documents.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.data_corpus import write_corpus  # noqa: E402
from ftray import config  # noqa: E402
from ftray.data.chunks import DatasetSpec, pack_chunk  # noqa: E402
from ftray.data.packing import best_fit  # noqa: E402
from ftray.data.sources import cut_shard, list_shards  # noqa: E402
from ftray.data.tokenizer import TokenizerLoader  # noqa: E402
from ftray.model.load import load_tokenizer  # noqa: E402


def measure_fill(source: config.SourceConfig, load: TokenizerLoader, seq_len: int, chunk_mb: float) -> dict[str, Any]:
    """Fill over all chunks of a source, each packed and forgotten."""
    stream = DatasetSpec((source,), seq_len, True, None, None, load)
    num_chunks = num_rows = num_records = num_tokens = 0
    for shard in list_shards(source.path):
        for chunk in cut_shard(shard, 0, int(chunk_mb * 1e6)):
            packed = pack_chunk(chunk, stream)
            num_chunks += 1
            num_rows += len(packed.sequences)
            num_records += len(packed.examples)
            num_tokens += sum(row.num_tokens for row in packed.sequences)
    fill = num_tokens / (num_rows * seq_len)
    return {
        "fill": round(fill, 5),
        "chunk_mb": chunk_mb,
        "chunks": num_chunks,
        "rows": num_rows,
        "records": num_records,
        "tokens": num_tokens,
    }


def measure_best_fit(num_documents: int = 100_000, seq_len: int = 4096) -> dict[str, Any]:
    """CPU seconds and fill for log-normal lengths, all in one window."""
    rng = random.Random(0)
    lengths = [min(seq_len, max(8, int(rng.lognormvariate(5.5, 0.9)))) for _ in range(num_documents)]
    began = time.process_time()
    rows = best_fit(lengths, seq_len)
    seconds = time.process_time() - began
    return {
        "documents": num_documents,
        "best_fit_cpu_s": round(seconds, 3),
        "fill": round(sum(lengths) / len(rows) / seq_len, 5),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--chunk-mb", type=float, nargs="+", default=[4.0])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--gsm8k", default="", help="train.jsonl of gsm8k")
    parser.add_argument("--base", default="embedded:smollm2-135m-instruct")
    args = parser.parse_args()
    load = TokenizerLoader(partial(load_tokenizer, config.ModelConfig(base=args.base)))
    print(json.dumps(measure_best_fit()), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"generated": config.SourceConfig(path=str(write_corpus(Path(scratch), args.mb, shard_mb=args.mb)))}
        if args.gsm8k:
            sources["gsm8k"] = config.SourceConfig(path=args.gsm8k, columns={"user": "question", "assistant": "answer"})
        for name, source in sources.items():
            for chunk_mb in args.chunk_mb:
                print(json.dumps({"set": name, **measure_fill(source, load, args.seq_len, chunk_mb)}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
