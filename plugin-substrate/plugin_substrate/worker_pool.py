"""The workers of one instance: one per tenant, as many as allowed, and turns for those who find no place."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from plugin_substrate.errors import PluginNotLoadedError
from plugin_substrate.tenant_worker import Seat, TenantWorker


class _Wanted:
    """A seat that has no worker yet, and how many calls wait for it."""

    def __init__(self) -> None:
        self.place: asyncio.Future[TenantWorker] = asyncio.get_running_loop().create_future()
        self.waiting = 0


class WorkerPool:
    """Gives every call a worker of its own tenant. Belongs to one event loop.

    When all places are taken, an idle worker goes, the one used least recently first. When none is idle, the worker
    that has had its place longest takes no new calls, and goes when those it has are done: the place is then for
    whoever waited longest. So no tenant, however much it calls, keeps another one out, and no running call is
    disturbed.
    """

    def __init__(self, instance_id: str, make: Callable[[Seat], TenantWorker], places: int) -> None:
        self._instance_id = instance_id
        self._make = make
        self._places = places
        self._workers: OrderedDict[Seat, TenantWorker] = OrderedDict()  # in the order in which they got their places
        self._leaving: set[TenantWorker] = set()  # still busy, take no new calls
        self._ending: dict[TenantWorker, asyncio.Task[None]] = {}
        self._wanted: OrderedDict[Seat, _Wanted] = OrderedDict()
        self._closed = False

    def __iter__(self) -> Iterator[TenantWorker]:
        return iter([*self._workers.values(), *self._leaving])

    def idle(self) -> list[TenantWorker]:
        """Return the workers that have a process and no call, the least recently used first."""
        idle = [worker for worker in self._workers.values() if not worker.holders and worker.alive]
        return sorted(idle, key=lambda worker: worker.last_used)

    def find(self, seat: Seat) -> TenantWorker | None:
        """Return the worker of a seat, if it has one."""
        return self._workers.get(seat)

    async def stop_processes(self) -> None:
        """End the processes of all workers; each starts another at its next call."""
        await asyncio.gather(*(worker.stop_process() for worker in self))

    async def admit(self, seat: Seat) -> TenantWorker:
        """Return the worker of a seat with one more holder; whoever gets it must `leave` it once."""
        worker = self._workers.get(seat)
        if worker is None:
            return await self._wait_for_place(seat)
        self.hold(worker)
        return worker

    def hold(self, worker: TenantWorker) -> None:
        """Hold a worker that was found here, as `admit` does."""
        worker.holders += 1

    def leave(self, worker: TenantWorker) -> None:
        """Give up a hold; the last one of a worker that served one run, or is to go, ends it."""
        worker.holders -= 1
        worker.last_used = time.monotonic()
        if worker.holders:
            return
        if worker.seat.run or worker in self._leaving:
            self.retire(worker)
        elif self._wanted:
            self._give_places()

    def retire(self, worker: TenantWorker) -> asyncio.Task[None]:
        """End an idle worker; its place is free when its process is gone. Returns the task that sees to it."""
        if worker in self._ending:
            return self._ending[worker]
        self._leaving.discard(worker)
        if self._workers.get(worker.seat) is worker:
            del self._workers[worker.seat]
        task = self._ending[worker] = asyncio.get_running_loop().create_task(worker.close())
        task.add_done_callback(lambda _: self._ended(worker))
        return task

    async def close(self) -> None:
        """End all workers, busy ones too, and turn away whoever waits for a place."""
        self._closed = True
        for wanted in self._wanted.values():
            wanted.place.set_exception(PluginNotLoadedError(f"{self._instance_id!r} is being unloaded"))
            wanted.place.exception()
        self._wanted.clear()
        for worker in list(self):
            self.retire(worker)
        if self._ending:
            await asyncio.wait(self._ending.values())

    async def _wait_for_place(self, seat: Seat) -> TenantWorker:
        if self._closed:
            raise PluginNotLoadedError(f"{self._instance_id!r} is being unloaded")
        wanted = self._wanted.get(seat)
        if wanted is None:
            wanted = self._wanted[seat] = _Wanted()
        wanted.waiting += 1
        self._give_places()
        try:
            await asyncio.wait({wanted.place})
        except asyncio.CancelledError:
            self._give_up(seat, wanted)
            raise
        return wanted.place.result()

    def _give_up(self, seat: Seat, wanted: _Wanted) -> None:
        wanted.waiting -= 1
        if not wanted.place.done():
            if not wanted.waiting:
                del self._wanted[seat]
        elif wanted.place.exception() is None:
            self.leave(wanted.place.result())

    def _give_places(self) -> None:
        """Place those who wait, the longest waiting first, as far as places are or can be made free."""
        while self._wanted and self._taken < self._places:
            seat, wanted = self._wanted.popitem(last=False)
            worker = self._workers[seat] = self._make(seat)
            worker.holders = wanted.waiting
            wanted.place.set_result(worker)
        coming = len(self._ending) + len(self._leaving)
        while coming < len(self._wanted) and self._workers:
            self._clear_a_place()
            coming += 1

    def _clear_a_place(self) -> None:
        idle = [worker for worker in self._workers.values() if not worker.holders]
        if idle:
            self.retire(min(idle, key=lambda worker: worker.last_used))
        else:
            _, longest = self._workers.popitem(last=False)
            self._leaving.add(longest)

    @property
    def _taken(self) -> int:
        return len(self._workers) + len(self._leaving) + len(self._ending)

    def _ended(self, worker: TenantWorker) -> None:
        del self._ending[worker]
        self._give_places()
