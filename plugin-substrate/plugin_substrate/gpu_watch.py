"""The highest GPU memory seen while calls run, by looking once a second; nobody reports it by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from plugin_substrate.monitor import MonitorReading
from plugin_substrate.process_tree import tree_usage
from plugin_substrate.tenant_worker import TenantWorker

_INTERVAL_SECONDS = 1.0


@dataclass
class _Watched:
    worker: TenantWorker
    peak_mb: float | None = field(default=None)


class GpuWatch:
    """Looks only while a call that uses a GPU runs. Belongs to one event loop."""

    def __init__(self, read: Callable[[], Awaitable[MonitorReading]]) -> None:
        self._read = read
        self._watched: dict[object, _Watched] = {}
        self._task: asyncio.Task[None] | None = None

    def begin(self, call: object, worker: TenantWorker) -> None:
        """Watch a worker until `end`."""
        self._watched[call] = _Watched(worker)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look())

    def end(self, call: object) -> float | None:
        """Return the highest amount seen, in MB; None when nothing was, as for a call shorter than a look."""
        watched = self._watched.pop(call, None)
        return watched.peak_mb if watched else None

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    async def _look(self) -> None:
        while self._watched:
            reading = await self._read()
            for watched in list(self._watched.values()):
                proxy = watched.worker.proxy
                held = reading.gpu_held_mb(tree_usage(proxy.pid).pids) if proxy is not None and proxy.alive else None
                if held is not None:
                    watched.peak_mb = max(held, watched.peak_mb or 0.0)
            await asyncio.sleep(_INTERVAL_SECONDS)
