"""Sees that a call has the resources its plugin needs before it is sent, and takes note of what it took."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

from plugin_substrate.errors import PluginResourceError
from plugin_substrate.eviction import Candidate, evict, eviction_order
from plugin_substrate.metadata import PluginMeta
from plugin_substrate.monitor import Ask, MonitorReading, read_monitor
from plugin_substrate.process_tree import tree_usage
from plugin_substrate.requirements import ResourceRequirements
from plugin_substrate.scheduling import GPU_MEMORY, SYSTEM_MEMORY, Allocation, ResourceScheduler, SystemFigures
from plugin_substrate.tenant_worker import TenantWorker
from plugin_substrate.worker_pool import WorkerPool

_MB = 1 << 20

Pools = Callable[[], Iterable[tuple[str, WorkerPool]]]  # by instance id


class ResourceAllocator:
    """Asks a scheduler for each call of a plugin that states an amount; calls of others pass at once.

    Calls that have to wait do so first come, first served. What a call was granted stays promised to it until it ends:
    as much of it as its worker has not taken yet is not free for others. Belongs to one event loop.
    """

    def __init__(self, scheduler: ResourceScheduler, pools: Pools) -> None:
        self._scheduler = scheduler
        self._pools = pools
        self._monitor: Ask | None = None
        self._monitor_id = ""
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._promises: dict[object, tuple[TenantWorker, ResourceRequirements]] = {}

    def register_monitor(self, instance_id: str, ask: Ask) -> None:
        """Take figures of GPUs, and of memory if it tells them, from a monitor plugin."""
        self._monitor_id, self._monitor = instance_id, ask

    @property
    def has_monitor(self) -> bool:
        """Whether a monitor plugin is registered."""
        return self._monitor is not None

    async def read(self) -> MonitorReading:
        """Return what the monitor says now."""
        return await read_monitor(self._monitor)

    def needed(self, meta: PluginMeta) -> bool:
        """Whether calls of a plugin have to be granted what they need."""
        return self._scheduler.reads_figures and meta.resources.any_amount

    async def allocate(self, meta: PluginMeta, worker: TenantWorker, call: object) -> None:
        """Return when a call may start; a `PluginResourceError` when what it needs cannot be had. `release` it once."""
        deadline = asyncio.get_running_loop().time() + self._scheduler.timeout
        async with self._turn:
            while not (answer := await self._ask(meta, worker)):
                if answer.shortfall is None or not await self._wait(deadline):
                    raise PluginResourceError(answer.reason, resource_shortfall=answer.shortfall)
            self._promises[call] = (worker, meta.resources)

    def release(self, call: object) -> None:
        """Note the end of a call, and take its promise back if it had one."""
        self._promises.pop(call, None)
        self.something_ended()

    def started(self, plugin_name: str) -> None:
        """Tell the scheduler that a call was sent."""
        self._scheduler.on_execution_start(plugin_name)

    def finished(self, plugin_name: str) -> None:
        """Tell the scheduler that a call has ended."""
        self._scheduler.on_execution_finish(plugin_name)

    def something_ended(self) -> None:
        """Have whoever waits look again."""
        self._changed.set()

    async def _ask(self, meta: PluginMeta, worker: TenantWorker) -> Allocation:
        """Ask the scheduler, evicting idle workers as long as that may help."""
        while True:
            self._changed.clear()  # what ends from here on may be missing in the figures
            reading = await self.read()
            answer = self._scheduler.allocate(meta, self._figures(reading, worker))
            if answer or answer.shortfall is None:
                return answer
            if not await self._evict_one(reading, answer.shortfall.resource, worker):
                return answer

    async def make_room(self, resource: str, pool: WorkerPool, worker: TenantWorker | None) -> None:
        """End every idle worker that holds some of a resource, and ``worker`` itself if it is idle."""
        reading = await self.read()
        while worker is not None and await self._evict_one(reading, resource, worker):
            pass
        if worker is not None and not worker.holders and not worker.closed:
            await pool.retire(worker)

    async def _evict_one(self, reading: MonitorReading, resource: str, needy: TenantWorker) -> bool:
        candidates = [
            self._candidate(reading, pool, worker)
            for instance_id, pool in self._pools()
            if instance_id != self._monitor_id
            for worker in pool.idle()
            if worker is not needy
        ]
        for candidate in eviction_order(candidates, resource):
            if await evict(candidate):
                return True
        return False

    def _candidate(self, reading: MonitorReading, pool: WorkerPool, worker: TenantWorker) -> Candidate:
        pids, resident = _tree(worker)
        return Candidate(worker=worker, pool=pool, memory_mb=resident, gpu_mb=reading.gpu_held_mb(pids))

    def _figures(self, reading: MonitorReading, worker: TenantWorker) -> SystemFigures:
        """What is free, less what is promised, and with what the worker of this call holds already."""
        figures = SystemFigures(
            gpu_free_memory_mb=reading.gpu_free_memory_mb,
            memory_available_mb=reading.memory_available_mb,
            missing=reading.missing,
        )
        for name, resource in (("gpu_free_memory_mb", GPU_MEMORY), ("memory_available_mb", SYSTEM_MEMORY)):
            free = getattr(figures, name)
            if free is not None:
                net = free - self._outstanding(reading, resource, worker) + _held(reading, resource, worker)
                figures = replace(figures, **{name: max(0.0, net)})
        return figures

    def _outstanding(self, reading: MonitorReading, resource: str, asking: TenantWorker) -> float:
        """What the workers of other calls were granted and have not taken yet; calls of one worker share a grant."""
        granted = {
            worker: needs.min_gpu_vram_mb if resource == GPU_MEMORY else needs.min_system_ram_mb
            for worker, needs in self._promises.values()
            if worker is not asking
        }
        return sum(max(0.0, amount - _held(reading, resource, worker)) for worker, amount in granted.items())

    async def _wait(self, deadline: float) -> bool:
        """Wait until something ended, or the interval has passed; False when the time is up."""
        remaining = deadline - asyncio.get_running_loop().time()
        if remaining <= 0:
            return False
        try:
            async with asyncio.timeout(min(remaining, self._scheduler.poll_interval)):
                await self._changed.wait()
        except TimeoutError:
            pass  # other programs make no events: look again
        return True


def _tree(worker: TenantWorker) -> tuple[tuple[int, ...], float]:
    """Return the processes of a worker and their resident memory in MB."""
    if worker.proxy is None or not worker.alive:
        return (), 0.0
    usage = tree_usage(worker.proxy.pid)
    return usage.pids, usage.resident_bytes / _MB


def _held(reading: MonitorReading, resource: str, worker: TenantWorker) -> float:
    pids, resident = _tree(worker)
    return (reading.gpu_held_mb(pids) or 0.0) if resource == GPU_MEMORY else resident
