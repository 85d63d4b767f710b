"""Counts the requests that use an adapter: an engine frees a removed adapter when its last request has ended.

A request holds its adapter from its first call on, because the adapter may be removed before the first token is read. A
request
that is never read has to release it too. Plain asyncio; knows no engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress

from ftray.engine.protocol import OutputChunk

logger = logging.getLogger(__name__)


class AdapterReferences:
    """Reference counts by adapter. free: awaited once per removed adapter, when no request uses it any more."""

    def __init__(self, free: Callable[[int], Awaitable[None]]) -> None:
        self._free = free
        self._users: Counter[int] = Counter()
        self._retired: set[int] = set()
        self._freeing: set[asyncio.Future[None]] = set()

    def take(self, adapter: int) -> AdapterReference:
        """A new reference. Call it in the event loop of `free`."""
        self._users[adapter] += 1
        return AdapterReference(self, adapter, asyncio.get_running_loop())

    async def retire(self, adapter: int) -> None:
        """Removes an adapter: it is freed now, or after its last request."""
        self._retired.add(adapter)
        await self._look(adapter)

    def num_held(self) -> int:
        """Number of references."""
        return self._users.total()

    async def _let_go(self, adapter: int) -> None:
        self._users[adapter] -= 1
        try:
            await self._look(adapter)
        except Exception as err:  # noqa: BLE001 - whatever an engine raises: the answer is whole
            logger.error("the adapter %s can't be freed: %s", adapter, err)

    async def _look(self, adapter: int) -> None:
        if self._users[adapter] > 0:
            return
        del self._users[adapter]
        if adapter in self._retired:
            self._retired.discard(adapter)
            freeing = asyncio.ensure_future(self._free(adapter))
            self._freeing.add(freeing)
            freeing.add_done_callback(self._freeing.discard)
            await asyncio.shield(freeing)  # it continues if the waiting request is cancelled


class AdapterReference:
    """One request's reference to an adapter."""

    def __init__(self, holds: AdapterReferences, adapter: int, loop: asyncio.AbstractEventLoop) -> None:
        self._holds, self._adapter, self._loop = holds, adapter, loop
        self._is_held = True

    async def end(self) -> None:
        """Releases the reference. Further calls have no effect."""
        if self._is_held:
            self._is_held = False
            await self._holds._let_go(self._adapter)

    def end_soon(self) -> None:
        """The same, for code that cannot await, in any thread."""
        if self._is_held:
            with suppress(RuntimeError):  # the loop is closed, and with it all that the hold was for
                self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self.end()))


class ReferencedChunks(AsyncIterator[OutputChunk]):
    """The chunks of a request. The reference lasts until their end, `aclose`, or until nobody can read them any more.

    Args:
        chunks: A generator that releases the reference itself once it has begun.
        hold: The reference.
    """

    def __init__(self, chunks: AsyncGenerator[OutputChunk, None], hold: AdapterReference) -> None:
        self._chunks, self._hold, self._has_begun = chunks, hold, False

    def __anext__(self) -> Awaitable[OutputChunk]:
        self._has_begun = True
        return self._chunks.__anext__()

    async def aclose(self) -> None:
        await self._chunks.aclose()
        await self._hold.end()

    def __del__(self) -> None:
        if not self._has_begun:
            self._hold.end_soon()
