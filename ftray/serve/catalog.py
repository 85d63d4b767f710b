"""Which models one replica answers for, and which adapters it holds: the registry is what should be, this is what is.

Knows the engine protocol and the registry; nothing of HTTP or Ray. A name that a client sends is looked up here and
nowhere else: it never becomes part of a path.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ftray.engine.protocol import Engine
from ftray.errors import CheckpointError, FtrayError, ModelError
from ftray.serve.models import local_adapter
from ftray.serve.protocol import RequestError
from ftray.serve.registry import Published, list_published

POLL_S = 1.0  # between two looks at the registry
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What a replica is told to serve: a model alone, or a base with adapters.

    adapters: fixed ones, id → URI. registry: URI of what is published for this base, looked at again and again; base,
    revision: what published adapters must have been trained on. max_adapters: held in memory at a time. lineages: of the
    model or the fixed adapters, by id: what their runs' origin is known by. references: what these were trained on, in
    figures, by id (`drift`).
    """

    model_id: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    registry: str | None = None
    base: str | None = None
    revision: str | None = None
    max_adapters: int = 0
    lineages: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Catalog:
    """Model ids → adapters, loaded when they are first asked for, the least recently used one unloaded for another.

    Unloading ends no request: the engine keeps what its running requests need. So beyond `max_adapters` there may be as
    many as requests run.
    """

    def __init__(self, engine: Engine, served: Served) -> None:
        self._engine, self._served = engine, served
        self._published: dict[str, Published] = {}
        self._told: set[str] = set()
        self._loaded: OrderedDict[str, None] = OrderedDict()  # keys of the engine's adapters, least recently used first
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}  # URI → why it can't be served; a version never changes
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the registry, and goes on doing so."""
        if self._served.registry is not None:
            await self._reconcile()
            self._task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stops looking."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def model_ids(self) -> list[str]:
        """All that may be asked for: the base or whole model, fixed adapters, published ones as `base:name`."""
        return [self._served.model_id, *self._served.adapters, *(self._public(name) for name in self._published)]

    def lineage(self, model_id: str) -> str | None:
        """Id of the lineage of the run that a model comes from, where it is known."""
        return self._served.lineages.get(model_id) or self._meta_of(model_id).get("lineage")

    def reference(self, model_id: str) -> Mapping[str, Any] | None:
        """Figures of a model's training data, where they are known."""
        return self._served.references.get(model_id) or self._meta_of(model_id).get("reference")

    def _meta_of(self, model_id: str) -> Mapping[str, Any]:
        prefix = self._public("")
        found = self._published.get(model_id.removeprefix(prefix)) if model_id.startswith(prefix) else None
        return {} if found is None else found.meta

    async def prepare(self, model_id: str) -> str | None:
        """The engine's name of the adapter that answers for `model_id`, loaded; None for the base.

        Use it before awaiting anything else: another request may push it out. Raises RequestError: 404 for an unknown
        model, 503 when its adapter can't be had.
        """
        if model_id == self._served.model_id:
            return None
        uri = self._uri_of(model_id)
        if uri is None:
            raise RequestError(404, f"the model {model_id!r} does not exist", param="model", code="model_not_found")
        while uri not in self._loaded:
            task = self._loading.get(uri)
            if task is None:
                task = self._loading[uri] = asyncio.create_task(self._load(uri))
                task.add_done_callback(lambda _: self._loading.pop(uri, None))
            try:
                await asyncio.shield(task)  # others may wait for it, too
            except FtrayError as err:
                logger.error("adapter %s: %s", model_id, err)
                message = f"the model {model_id} is not available at the moment; try again"
                raise RequestError(503, message, code="model_unavailable") from None
        self._loaded.move_to_end(uri)
        return uri

    async def _load(self, uri: str) -> None:
        if uri in self._refused:
            raise ModelError(self._refused[uri])
        try:
            directory = await asyncio.to_thread(local_adapter, uri)
            await self._engine.load_adapter(uri, str(directory))
        except (ModelError, CheckpointError) as err:
            self._refused[uri] = str(err)
            raise
        self._loaded[uri] = None
        while len(self._loaded) > max(1, self._served.max_adapters):
            await self._engine.unload_adapter(self._loaded.popitem(last=False)[0])

    def _uri_of(self, model_id: str) -> str | None:
        if model_id in self._served.adapters:
            return self._served.adapters[model_id]
        return next((p.uri for name, p in self._published.items() if self._public(name) == model_id), None)

    def _public(self, name: str) -> str:
        return f"{self._served.model_id}:{name}"

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self._reconcile()
            except FtrayError as err:  # a store that is down changes nothing in what is served
                self._tell(f"the registry can't be read: {err}")

    async def _reconcile(self) -> None:
        assert self._served.registry is not None
        found = await asyncio.to_thread(list_published, self._served.registry, self._published)
        self._published = {name: one for name, one in found.items() if self._fits(one)}
        wanted = {one.uri for one in self._published.values()} | set(self._served.adapters.values())
        self._refused = {uri: why for uri, why in self._refused.items() if uri in wanted}
        for uri in [uri for uri in self._loaded if uri not in wanted]:  # taken away, or there is a newer version
            del self._loaded[uri]
            await self._engine.unload_adapter(uri)

    def _fits(self, one: Published) -> bool:
        theirs = (one.meta.get("base"), one.meta.get("revision"))
        if theirs == (self._served.base, self._served.revision):
            return True
        mine = f"{self._served.base} (revision {self._served.revision})"
        self._tell(f"{one.uri} was trained on {theirs[0]} (revision {theirs[1]}), not on {mine}: it is not served")
        return False

    def _tell(self, text: str) -> None:
        if text not in self._told:  # once, not each second
            self._told.add(text)
            logger.warning("%s", text)
