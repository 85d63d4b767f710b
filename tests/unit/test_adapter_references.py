"""Adapters that were taken away are freed after the last request that holds them, also one that was never read."""

import asyncio
import gc
from collections.abc import AsyncGenerator

import pytest

from ftray.engine.adapter_references import AdapterReference, AdapterReferences, ReferencedChunks
from ftray.engine.protocol import OutputChunk


class Desk:
    """Gives out chunks of an adapter, and remembers what was freed."""

    def __init__(self) -> None:
        self.freed: list[int] = []
        self.holds = AdapterReferences(self._free)

    async def _free(self, adapter: int) -> None:
        await asyncio.sleep(0)
        self.freed.append(adapter)

    def ask(self, adapter: int) -> ReferencedChunks:
        hold = self.holds.take(adapter)
        return ReferencedChunks(self._say(hold), hold)

    async def _say(self, hold: AdapterReference) -> AsyncGenerator[OutputChunk, None]:
        try:
            for i in range(3):
                await asyncio.sleep(0)
                yield OutputChunk("x", [i], "length" if i == 2 else None, 1, i + 1)
        finally:
            await hold.end()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "how", ["read", "closed unread", "dropped unread", "closed midway", "dropped midway", "cancelled"]
)
def test_whatever_becomes_of_a_request_its_hold_ends_once(how: str) -> None:
    desk = Desk()

    async def read(chunks: ReferencedChunks) -> None:
        async for _ in chunks:
            pass

    async def work() -> None:
        other = desk.ask(7)
        chunks = desk.ask(7)
        await desk.holds.retire(7)
        assert desk.holds.num_held() == 2
        if how == "read":
            await read(chunks)
        elif how == "closed unread":
            await chunks.aclose()
            await chunks.aclose()
        elif how == "closed midway":
            await anext(chunks)
            await chunks.aclose()
        elif how == "dropped midway":
            await anext(chunks)
        elif how == "cancelled":
            task = asyncio.create_task(read(chunks))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            del task
        del chunks
        gc.collect()
        await settle()
        assert (desk.holds.num_held(), desk.freed) == (1, [])
        await read(other)
        assert (desk.holds.num_held(), desk.freed) == (0, [7])

    asyncio.run(work())
    gc.collect()
    assert desk.freed == [7]


def test_what_is_not_retired_is_not_freed_and_what_nobody_holds_is_freed_at_once() -> None:
    desk = Desk()

    async def work() -> None:
        await desk.ask(1).aclose()
        assert desk.freed == []
        await desk.holds.retire(1)
        assert desk.freed == [1]

    asyncio.run(work())


def test_a_request_that_outlives_its_loop_ends_quietly() -> None:
    desk, kept = Desk(), []

    async def work() -> None:
        kept.append(desk.ask(1))

    asyncio.run(work())
    kept.clear()
    gc.collect()
    assert desk.freed == []
