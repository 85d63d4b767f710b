"""The endpoint under fire: an open loop of clients at several times capacity, and what our path adds to an engine.

    python -m bench.serve_load load --seconds 180 --times 5       # a fake engine: 30 tokens/s on each stream
    python -m bench.serve_load load --model runs/x/model/merged   # a real one; its capacity is measured first
    python -m bench.serve_load overhead --streams 32              # the fake engine bare, and behind Serve, in one run
    python -m bench.serve_load burst --tokens 6 --queued 70       # 70 requests at once against 12 slots
    python -m bench.serve_load ratio --model … --engine vllm      # tokens a second of an engine bare, and behind Serve

Half of the requests of `load` are streams, whose tokens are counted against the usage at their end; an answer that ends
otherwise than with its usage and [DONE] is truncated, one that never ends is hung. Prints figures, and a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import ray
from ray import serve

from bench.fake_engine import TOKENS_PER_S, FakeEngine, start_fake
from ftray import config
from ftray.engine.protocol import SamplingParams
from ftray.serve import proxy
from ftray.serve.adapter_cache import ServedModels
from ftray.serve.run import start_endpoint

HUNG_S = 120.0


@dataclass
class Seen:
    """How requests ended. latencies_s: of admitted ones, from the time they were due."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_hung: int = 0
    num_truncated: int = 0
    num_without_retry_after: int = 0
    num_broken: int = 0

    def figures(self) -> dict[str, Any]:
        return {
            "statuses": dict(sorted(self.statuses.items())),
            "p50_s": _quantile(self.latencies_s, 0.5),
            "p99_s": _quantile(self.latencies_s, 0.99),
            "hung": self.num_hung,
            "truncated": self.num_truncated,
            "broken": self.num_broken,
            "refused_without_retry_after": self.num_without_retry_after,
        }


def _quantile(values: list[float], q: float) -> float | None:
    return round(sorted(values)[min(len(values) - 1, int(q * len(values)))], 4) if values else None


async def ask(session: aiohttp.ClientSession, url: str, model: str, num_tokens: int, stream: bool, seen: Seen) -> None:
    """One request, read to its end."""
    body: dict[str, Any] = {"model": model, "prompt": "hello", "max_tokens": num_tokens, "stream": stream}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    begin = time.monotonic()
    try:
        async with asyncio.timeout(HUNG_S), session.post(f"{url}/completions", json=body) as response:
            seen.statuses[response.status] += 1
            if response.status != 200:
                seen.num_without_retry_after += "retry-after" not in response.headers
                await response.read()
                return
            if not stream:
                usage = json.loads(await response.read())["usage"]
                seen.num_truncated += usage["completion_tokens"] < 1
                seen.num_tokens += usage["completion_tokens"]
            elif not await _read_stream(response, begin, seen):
                seen.num_truncated += 1
            seen.latencies_s.append(time.monotonic() - begin)
    except TimeoutError:
        seen.num_hung += 1
    except aiohttp.ClientError:
        seen.num_broken += 1


async def _read_stream(response: aiohttp.ClientResponse, begin: float, seen: Seen) -> bool:
    """Whether as many tokens came as its usage says, and then [DONE]."""
    num_chunks, usage = 0, None
    async for line in response.content:
        if line == b"data: [DONE]\n":
            seen.num_tokens += usage["completion_tokens"] if usage else 0
            return usage is not None and 1 <= num_chunks <= usage["completion_tokens"]
        if not line.startswith(b"data: "):
            continue
        chunk = json.loads(line[6:])
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            num_chunks += 1
            if num_chunks == 1:
                seen.first_s.append(time.monotonic() - begin)
            if chunk["model"] == "fake" and choice["text"]:
                seen.late_s.append(time.time() - float(choice["text"].split()[-1]))
    return False


async def open_loop(url: str, model: str, rate: float, seconds: float, tokens: tuple[int, int]) -> Seen:
    """Requests at a rate that waits for nobody."""
    seen, rng, tasks = Seen(), random.Random(0), set()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begin, due = time.monotonic(), 0.0
        while due < seconds:
            await asyncio.sleep(max(0.0, begin + due - time.monotonic()))
            work = ask(session, url, model, rng.randint(*tokens), rng.random() < 0.5, seen)
            tasks.add(asyncio.create_task(work))
            due += rng.expovariate(rate)
        await asyncio.gather(*tasks)
    return seen


async def closed_loop(url: str, model: str, num_clients: int, seconds: float, tokens: tuple[int, int]) -> Seen:
    """Each of so many clients asks again and again; those that have begun are read to their end."""
    seen, end, rng = Seen(), time.monotonic() + seconds, random.Random(1)

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            await ask(session, url, model, rng.randint(*tokens), True, seen)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*[client(session) for _ in range(num_clients)])
    return seen


def serving_processes() -> list[psutil.Process]:
    """All replicas and proxies of this machine's Ray."""
    titles = ("ray::Serve", "ray::Proxy")
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if any(title in " ".join(p.info["cmdline"] or []) for title in titles)]


def resident_mb() -> float:
    """Their memory together."""
    return sum(p.memory_info().rss for p in serving_processes()) / 1e6


def cpu_s() -> float:
    """Processor time that they have used: a figure that other work on the machine doesn't blur."""
    return sum(sum(p.cpu_times()[:2]) for p in serving_processes())


def _config(num_ongoing: int, num_queued: int) -> config.ServeConfig:
    return config.ServeConfig(port=0, target_ongoing_requests=num_ongoing / 1.5, max_queued_requests=num_queued)


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Capacity first, then several times as much."""
    tokens = (options.tokens // 2, options.tokens * 3 // 2)
    if options.model is None:
        url, model, max_ongoing = start_fake(_config(options.ongoing, options.queued)), "fake", options.ongoing
        capacity = max_ongoing / (options.tokens / TOKENS_PER_S)
    else:
        cfg = _config(options.ongoing, options.queued)
        url = start_endpoint(Path(options.model), ServedModels("real"), cfg, num_cpus=options.cpus).url
        model, max_ongoing = "real", options.ongoing
        capacity = asyncio.run(closed_loop(url, model, max_ongoing, 20, tokens)).statuses[200] / 20
    at = asyncio.run(open_loop(url, model, 0.8 * capacity, options.seconds, tokens))
    before = resident_mb()
    over = asyncio.run(open_loop(url, model, options.times * capacity, options.seconds, tokens))
    return {
        "capacity_per_s": round(capacity, 2),
        "at_0.8": at.figures(),
        f"at_{options.times:g}": over.figures(),
        "p99_ratio": round((_quantile(over.latencies_s, 0.99) or 0) / (_quantile(at.latencies_s, 0.99) or 1), 2),
        "memory_mb": [round(before), round(resident_mb())],
    }


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """What each token, and the first one, waits for between the engine and the client."""

    async def bare() -> Seen:
        seen, engine = Seen(), FakeEngine()

        async def one(place: int) -> None:
            await asyncio.sleep(place * apart_s)
            begin = time.monotonic()
            async for chunk in engine.generate("", [1], SamplingParams(max_tokens=options.tokens)):
                if chunk.num_generated_tokens == 1:
                    seen.first_s.append(time.monotonic() - begin)
                seen.late_s.append(time.time() - float(chunk.text))

        await asyncio.gather(*[one(place) for place in range(options.streams)])
        return seen

    async def later(place: int, what: Coroutine[Any, Any, None]) -> None:
        await asyncio.sleep(place * apart_s)
        await what

    async def served(url: str) -> Seen:
        seen = Seen()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for num_tokens in (1, options.tokens):  # connections and code are warm in the second
                seen = Seen()
                asked = [ask(session, url, "fake", num_tokens, True, seen) for _ in range(options.streams)]
                await asyncio.gather(*[later(place, what) for place, what in enumerate(asked)])
        return seen

    apart_s = options.spread / options.streams
    url = start_fake(_config(options.streams, options.streams))
    one, before_s = asyncio.run(bare()), cpu_s()
    other = asyncio.run(served(url))
    cpu_ms = 1000 * (cpu_s() - before_s) / (options.streams * (options.tokens + 1))

    def told(seen: Seen) -> dict[str, Any]:
        return {
            "first_token_ms": round(1000 * statistics.median(seen.first_s), 2),
            "token_late_p50_ms": round(1000 * (_quantile(seen.late_s, 0.5) or 0), 2),
            "token_late_p99_ms": round(1000 * (_quantile(seen.late_s, 0.99) or 0), 2),
            "tokens": len(seen.late_s),
        }

    return {
        "streams": options.streams,
        "spread_s": options.spread,
        "bare": told(one),
        "served": told(other),
        "cpu_ms_per_token": round(cpu_ms, 3),
        "truncated": other.num_truncated,
    }


BURST, ROUNDS = 70, 5


def burst(options: argparse.Namespace) -> dict[str, Any]:
    """The rate of many requests at once, compared with the rate of as many as there are slots, in rounds."""
    url = start_fake(_config(options.ongoing, options.queued))

    async def rate(at_once: int) -> float:
        """Answers per second of BURST requests, `at_once` of them at a time."""
        seen, slots = Seen(), asyncio.Semaphore(at_once)

        async def one(session: aiohttp.ClientSession) -> None:
            async with slots:
                await ask(session, url, "fake", options.tokens, False, seen)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            begin = time.monotonic()
            await asyncio.gather(*[one(session) for _ in range(BURST)])
        assert seen.statuses == {200: BURST}, seen.statuses
        return BURST / (time.monotonic() - begin)

    asyncio.run(rate(options.ongoing))  # connections and code are warm afterwards
    rounds = [(asyncio.run(rate(options.ongoing)), asyncio.run(rate(BURST))) for _ in range(ROUNDS)]
    return {
        f"{options.ongoing} at a time, per s": [round(steady, 1) for steady, _ in rounds],
        f"{BURST} at once, per s": [round(many, 1) for _, many in rounds],
        "ratio": [round(many / steady, 3) for steady, many in rounds],
    }


def ratio(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second at 1 and at 8 requests at a time: of the engine in this process, then of an endpoint around it."""
    from ftray.engine.batch import complete

    tokens, levels = (options.tokens // 2, options.tokens * 3 // 2), (1, 8)

    async def bare() -> list[float]:
        engine = _engine(options)
        await engine.start()
        prompt = list(engine.tokenizer("hello", add_special_tokens=False)["input_ids"])
        found = []
        for level in levels:
            rng, begin, num_tokens = random.Random(1), time.monotonic(), 0

            async def client(name: str, rng: random.Random = rng, begin: float = begin) -> int:
                num, asked = 0, 0
                while time.monotonic() < begin + options.seconds:
                    asked += 1
                    params = SamplingParams(max_tokens=rng.randint(*tokens), temperature=1.0)
                    num += len((await complete(engine, f"{name}-{asked}", prompt, params)).token_ids)
                return num

            num_tokens = sum(await asyncio.gather(*[client(f"{level}-{i}") for i in range(level)]))
            found.append(num_tokens / (time.monotonic() - begin))
        await engine.stop()
        return found

    alone = asyncio.run(bare())
    cfg = _config(8, 8).model_copy(update={"engine": options.engine})
    url = start_endpoint(Path(options.model), ServedModels("real"), cfg, num_cpus=options.cpus, max_context=1024).url
    behind = []
    for level in levels:
        begin = time.monotonic()
        seen = asyncio.run(closed_loop(url, "real", level, options.seconds, tokens))
        behind.append(seen.num_tokens / (time.monotonic() - begin))
    return {
        f"{level} at a time": {"bare": round(one, 1), "served": round(other, 1), "ratio": round(other / one, 3)}
        for level, one, other in zip(levels, alone, behind, strict=True)
    }


def _engine(options: argparse.Namespace) -> Any:
    if options.engine == "vllm":
        from ftray.engine.vllm.engine import VllmEngine

        return VllmEngine(options.model, max_context=1024)
    from ftray.engine.batch import load_engine

    return load_engine(Path(options.model), num_threads=int(options.cpus), max_context=1024)


def main() -> None:
    """Parses, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "overhead", "burst", "ratio"])
    parser.add_argument("--model", help="a model directory instead of the fake engine (load, ratio)")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="for ratio")
    parser.add_argument("--cpus", type=float, default=1.0, help="of the real model's replica")
    parser.add_argument("--seconds", type=float, default=180.0, help="of each of the two phases")
    parser.add_argument("--times", type=float, default=5.0, help="capacity in the second phase")
    parser.add_argument("--tokens", type=int, default=60, help="of an answer, on average")
    parser.add_argument("--ongoing", type=int, default=12, help="answers at a time")
    parser.add_argument("--queued", type=int, default=6, help="requests that may wait")
    parser.add_argument("--streams", type=int, default=32, help="at once (overhead)")
    parser.add_argument("--spread", type=float, default=1.0, help="seconds over which the streams begin; 0: at once")
    options = parser.parse_args()
    proxy.announce()
    ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False, logging_level="error")
    try:
        print(
            json.dumps(
                {"load": load, "overhead": overhead, "burst": burst, "ratio": ratio}[options.what](options), indent=1
            )
        )
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
