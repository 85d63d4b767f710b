"""Fifty adapters through eight places of one replica, for minutes: is any answer wrong, and how soon does a new one answer?

    python -m bench.adapter_cycle --seconds 300

Each adapter of the tiny model has an answer of its own to each prompt, worked out by PEFT beforehand. Clients ask random
adapters and the base; every few seconds one is published anew under a name of its own, timed until it answers, and removed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from ftray.serve.registry import registry_of, remove
from tests.e2e.test_chat_page import serving
from tests.unit.test_adapter_endpoint import NUM_TOKENS, TIED, endpoint_of, least_gap, put_adapter
from tests.unit.test_adapters import of_peft
from tests.unit.test_engine import by_generate, byte_tokenizer, make_prompts


def expected_answers(made: dict[str, Path], prompts: list[list[int]]) -> dict[tuple[str | None, int], str]:
    """Text of each model's greedy answer to each prompt, where it doesn't hang on a tie."""
    decode, found = byte_tokenizer().decode, {}
    for name in (None, *made):
        model = of_peft(made[name] if name else None)
        for i, prompt in enumerate(prompts):
            tokens = by_generate(model, prompt, NUM_TOKENS)
            if least_gap(model, prompt, tokens) > TIED:
                found[name, i] = str(decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")
    return found


async def cycle(url: str, root: Path, expected: dict[tuple[str | None, int], str], options: argparse.Namespace) -> Any:
    """Asks until the time is over; counts."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    seen: Counter[str] = Counter()
    prompts, end = make_prompts(6), time.monotonic() + options.seconds
    answers_after_s: list[float] = []

    async def ask(name: str | None, i: int) -> str:
        model = f"tiny:{name}" if name else "tiny"
        how: Any = {"model": model, "prompt": prompts[i], "max_tokens": NUM_TOKENS, "temperature": 0}
        return str((await client.completions.create(**how)).choices[0].text)

    async def work(rng: random.Random) -> None:
        while time.monotonic() < end:
            key = rng.choice(list(expected))
            try:
                seen["right" if await ask(*key) == expected[key] else "WRONG"] += 1
            except openai.APIStatusError as err:
                seen[str(err.status_code)] += 1

    async def publish() -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            name = f"new{number}"
            await asyncio.to_thread(put_adapter, root, name, 1000 + number)
            begin = time.monotonic()
            while True:
                try:
                    await ask(name, 0)
                    break
                except openai.NotFoundError:
                    await asyncio.sleep(0.05)
            answers_after_s.append(time.monotonic() - begin)
            remove(registry_of(str(root), "tiny"), name)
            await asyncio.sleep(5)

    await asyncio.gather(publish(), *[work(random.Random(i)) for i in range(6)])
    ordered = sorted(answers_after_s)
    return {
        "answers": dict(seen),
        "published": len(ordered),
        "answers_after_s": {"median": round(ordered[len(ordered) // 2], 2), "most": round(ordered[-1], 2)},
    }


def main() -> None:
    """Makes the adapters, serves, prints figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--places", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        app = endpoint_of(root, options.places)
        made = {f"a{i:02d}": put_adapter(root, f"a{i:02d}", i) for i in range(options.adapters)}
        expected = expected_answers(made, make_prompts(6))
        with serving(app) as url:
            print(json.dumps(asyncio.run(cycle(url, root, expected, options)), indent=1))


if __name__ == "__main__":
    main()
