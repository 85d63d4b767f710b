"""The models of a replica and its loaded adapters: the registry is the desired state, this is the actual state.

Knows the engine protocol and the registry, but not HTTP or Ray. A client's model name is only looked up here; it never becomes
part of a path.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ftray.console import printable
from ftray.engine.protocol import Engine
from ftray.errors import CheckpointError, FtrayError, ModelError
from ftray.serve.model_files import local_adapter
from ftray.serve.openai import RequestError
from ftray.serve.registry import Scan, scan
from ftray.serve.registry_schema import PublishedAdapter, Rejected

POLL_S = 1.0  # between two reads of the registry
SURPRISED_S = 60.0  # how long an adapter is refused after an unexpected error
_PATH = re.compile(r"(?<![\w.])(?:\w+:/)?/\S*?(?P<file>/adapter_\w+\.\w+)?(?=[\s,;:)'\"]|$)")
MAX_LOGGED = 100  # rejected entries that are logged per read; others are counted only
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModels:
    """The models of a replica: a single model, or a base with adapters.

    Attributes:
        model_id: Name of the model or base.
        adapters: Fixed adapters, id → URI.
        registry: URI of the base's published adapters, which is read regularly.
        base: The base that published adapters must have been trained on.
        revision: Its revision.
        max_adapters: Adapters in memory.
        lineages: Lineage ids of the model or fixed adapters, by id.
        references: Statistics of their training data, by id (`drift`).
        trusted_keys: Public keys, one of which must have signed a published adapter. Without keys, signatures are not checked.
        max_adapter_bytes: Largest weights file of a published adapter.
    """

    model_id: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    registry: str | None = None
    base: str | None = None
    revision: str | None = None
    max_adapters: int = 0
    lineages: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trusted_keys: tuple[str, ...] = ()
    max_adapter_bytes: int | None = None


class AdapterCache:
    """Loads adapters on their first request, and unloads the least recently used one for another.

    Unloading ends no request: the engine keeps the adapters of its running requests, so there may be more than `max_adapters`.
    """

    def __init__(
        self, engine: Engine, served: ServedModels, on_rejected: Callable[[Rejected], None] = lambda _: None
    ) -> None:
        self._engine, self._served, self._on_rejected = engine, served, on_rejected
        self._scan: Scan | None = None  # None: the registry was never read
        self._published: dict[str, PublishedAdapter] = {}
        self._reported: frozenset[Rejected] = frozenset()  # rejected entries of the last read
        self._trouble = ""  # error of the last read
        self._loaded: OrderedDict[str, None] = OrderedDict()  # keys of the engine's adapters, least recently used first
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, tuple[str, float]] = {}  # URI → reason of the refusal, and its end
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the registry and keeps reading it. A registry that is down does not keep a replica from starting."""
        if self._served.registry is not None:
            await self._look()
            self._task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stops reading the registry."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def model_ids(self) -> list[str]:
        """All model names: the base or model, fixed adapters, and published ones as `base:name`."""
        return [self._served.model_id, *self._served.adapters, *(self._public(name) for name in self._published)]

    def may_exist(self, model_id: str) -> bool:
        """Whether a model outside `model_ids` may be published, because the registry could not be read yet."""
        return self._served.registry is not None and self._scan is None and model_id.startswith(self._public(""))

    def lineage(self, model_id: str) -> str | None:
        """Lineage id of the run that a model comes from, if known."""
        return self._served.lineages.get(model_id) or self._meta_of(model_id).get("lineage")

    def reference(self, model_id: str) -> Mapping[str, Any] | None:
        """Statistics of a model's training data, if known."""
        return self._served.references.get(model_id) or self._meta_of(model_id).get("reference")

    def _meta_of(self, model_id: str) -> Mapping[str, Any]:
        found = self._published_as(model_id)
        return {} if found is None else found.meta

    def _published_as(self, model_id: str) -> PublishedAdapter | None:
        prefix = self._public("")
        return self._published.get(model_id.removeprefix(prefix)) if model_id.startswith(prefix) else None

    async def prepare(self, model_id: str) -> str | None:
        """The engine's name of the adapter that answers for `model_id`, loaded; None for the base.

        Use it before awaiting anything else: another request may unload it.

        Raises:
            RequestError: 404 for an unknown model. 503 if its adapter is not available now, or can never be served.
        """
        if model_id == self._served.model_id:
            return None
        published = None if model_id in self._served.adapters else self._published_as(model_id)
        uri = published.uri if published is not None else self._served.adapters.get(model_id)
        sums = None if published is None else published.sha256
        if uri is None:
            raise RequestError(404, f"the model {model_id!r} does not exist", param="model", code="model_not_found")
        while uri not in self._loaded:
            task = self._loading.get(uri)
            if task is None:
                task = self._loading[uri] = asyncio.create_task(self._load(uri, sums))
                task.add_done_callback(lambda _: self._loading.pop(uri, None))
            try:
                await asyncio.shield(task)  # others may wait for it too
            except FtrayError as err:
                logger.error("adapter %s: %s", model_id, err)
                raise self._refusal(model_id, uri) from None
        self._loaded.move_to_end(uri)
        return uri

    def _refusal(self, model_id: str, uri: str) -> RequestError:
        reason, until_s = self._refused.get(uri, ("", 0.0))
        if until_s < math.inf:
            message = f"the model {model_id} is not available at the moment; try again"
            return RequestError(503, message, code="model_unavailable")
        shown = _PATH.sub(lambda path: model_id + (path["file"] or ""), reason)  # clients learn no paths
        message = f"the model {model_id} cannot be served: {shown}"
        return RequestError(503, message, code="model_unavailable", is_permanent=True)

    async def _load(self, uri: str, sums: Mapping[str, str] | None) -> None:
        if uri in self._refused:
            reason, until_s = self._refused[uri]
            if time.monotonic() < until_s:
                raise ModelError(reason)
        try:
            directory = await asyncio.to_thread(local_adapter, uri, sums)
            await self._engine.load_adapter(uri, str(directory))
        except (ModelError, CheckpointError) as err:
            self._refused[uri] = (str(err), math.inf)  # a version never changes
            raise
        except FtrayError:  # the store or the engine may recover
            raise
        except Exception as err:  # any error of a library on foreign files concerns one adapter, not the replica
            reason = f"{uri} can't be loaded ({type(err).__name__}: {' '.join(str(err).split())[:200]})"
            self._refused[uri] = (reason, time.monotonic() + SURPRISED_S)
            raise ModelError(reason) from err
        self._loaded[uri] = None
        while len(self._loaded) > max(1, self._served.max_adapters):
            await self._engine.unload_adapter(self._loaded.popitem(last=False)[0])

    def _public(self, name: str) -> str:
        return f"{self._served.model_id}:{name}"

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._look()

    async def _look(self) -> None:
        """Reads the registry once. It raises nothing: if the store is down, the served models stay the same."""
        try:
            await self._reconcile()
            self._trouble = ""
        except Exception as err:
            known = isinstance(err, FtrayError)
            trouble = str(err) if known else type(err).__name__
            if trouble != self._trouble:  # log it once, not every second
                logger.warning("Could not read the registry: %s", printable(trouble), exc_info=not known)
            self._trouble = trouble

    async def _reconcile(self) -> None:
        assert self._served.registry is not None
        found = await asyncio.to_thread(
            scan,
            self._served.registry,
            self._scan,
            trusted=self._served.trusted_keys,
            max_adapter_bytes=self._served.max_adapter_bytes,
        )
        misfits = {name: reason for name, one in found.adapters.items() if (reason := self._misfit(one))}
        self._report(frozenset(found.rejected.values()) | frozenset(misfits.values()))
        self._scan = found
        self._published = {name: one for name, one in found.adapters.items() if name not in misfits}
        wanted = {one.uri for one in self._published.values()} | set(self._served.adapters.values())
        self._refused = {uri: why for uri, why in self._refused.items() if uri in wanted}
        for uri in [uri for uri in self._loaded if uri not in wanted]:  # removed, or replaced by a newer version
            del self._loaded[uri]
            await self._engine.unload_adapter(uri)

    def _misfit(self, one: PublishedAdapter) -> Rejected | None:
        theirs = (one.meta.get("base"), one.meta.get("revision"))
        if theirs == (self._served.base, self._served.revision):
            return None
        mine = f"{self._served.base} (revision {self._served.revision})"
        reason = f"it was trained on {theirs[0]} (revision {theirs[1]}), not on {mine}"
        return Rejected(one.name, one.version, one.uri, "base", reason)

    def _report(self, rejected: frozenset[Rejected]) -> None:
        """Counts and logs rejected entries, once per version and reason."""
        new = sorted(rejected - self._reported, key=lambda one: one.uri)
        for one in new:
            self._on_rejected(one)
        for one in new[:MAX_LOGGED]:
            logger.warning("%s", printable(str(one)))
        if len(new) > MAX_LOGGED:
            logger.warning("%s more entries of the registry are not served", len(new) - MAX_LOGGED)
        self._reported = rejected
