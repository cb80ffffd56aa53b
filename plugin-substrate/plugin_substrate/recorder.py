"""Folds what calls took into a store: on the event loop only sums grow, and another thread writes them in batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from plugin_substrate.errors import StoreError
from plugin_substrate.stores.empirical import EmpiricalResourceRecord, EmpiricalResourceStore, ResourceSample

T = TypeVar("T")

_LINGER_SECONDS = 0.5
_MOST_WAITING = 1000

_logger = logging.getLogger(__name__)


class _Key(NamedTuple):
    instance_id: str
    config_hash: str


class EmpiricalRecorder:
    """Belongs to one event loop. A store that fails costs its batch, never a call; the host's log says so once."""

    def __init__(self, store: EmpiricalResourceStore) -> None:
        self._store = store
        self._waiting: dict[_Key, list[ResourceSample]] = {}
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._executor: ThreadPoolExecutor | None = None
        self._warned = False

    def add(self, sample: ResourceSample) -> None:
        """Take note of a call; it is in the store half a second later, or when the `records` are asked for."""
        self._waiting.setdefault(_Key(sample.instance_id, sample.config_hash), []).append(sample)
        self._count += 1
        if self._count >= _MOST_WAITING:
            self._write_soon()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._write_soon)

    async def records(self) -> list[EmpiricalResourceRecord]:
        """Write what waits, and return all that is in the store."""
        await self._write()
        return await self._apart(self._store.list_all)

    async def close(self) -> None:
        """Write what waits and give up the thread; a later call takes another."""
        await self._write()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _write_soon(self) -> None:
        task = asyncio.get_running_loop().create_task(self._write())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._count = 0

    async def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        async with self._writing:
            waiting, self._waiting, self._count = self._waiting, {}, 0
            if not waiting:
                return
            try:
                await self._apart(self._fold, list(waiting.values()))
            except StoreError as error:
                if not self._warned:
                    self._warned = True
                    _logger.warning("what calls took is not recorded: %s", error)

    async def _apart(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="empirical")
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)

    def _fold(self, groups: list[list[ResourceSample]]) -> None:
        self._store.add([EmpiricalResourceRecord.of(*samples) for samples in groups])
