"""Folds what calls took into a store: on the event loop only sums grow, and another thread writes them in batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from plugin_substrate.errors import StoreError
from plugin_substrate.stores.empirical import EmpiricalResourceRecord, EmpiricalResourceStore, add_usage

T = TypeVar("T")

_LINGER_SECONDS = 0.5

_logger = logging.getLogger(__name__)


class Payer(NamedTuple):
    """For which instance, under which configuration, a call is booked."""

    plugin_name: str
    instance_id: str
    config_hash: str


class _Sums:
    """The calls of one payer since the last write, as sums: what is done for each call must be next to nothing."""

    def __init__(self) -> None:
        self.calls = self.successes = 0
        self.seconds = 0.0
        self.cpu, self.memory, self.gpu = _Figure(), _Figure(), _Figure()
        self.usage: dict[str, float] = {}

    def record(self, payer: Payer) -> EmpiricalResourceRecord:
        return EmpiricalResourceRecord(
            instance_id=payer.instance_id,
            config_hash=payer.config_hash,
            plugin_name=payer.plugin_name,
            sample_count=self.calls,
            success_count=self.successes,
            duration_seconds_mean=self.seconds / self.calls,
            cpu_samples=self.cpu.count,
            cpu_percent_mean=self.cpu.mean,
            memory_samples=self.memory.count,
            memory_mb_peak_max=self.memory.highest,
            memory_mb_peak_mean=self.memory.mean,
            gpu_samples=self.gpu.count,
            gpu_memory_mb_peak_max=self.gpu.highest,
            gpu_memory_mb_peak_mean=self.gpu.mean,
            last_observed=datetime.now(UTC),
            api_usage_totals=self.usage,
        )


class _Figure:
    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.highest: float | None = None

    def add(self, value: float | None) -> None:
        if value is not None:
            self.count += 1
            self.total += value
            if self.highest is None or value > self.highest:
                self.highest = value

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


class EmpiricalRecorder:
    """Belongs to one event loop. A store that fails costs its batch, never a call; the host's log says so once."""

    def __init__(self, store: EmpiricalResourceStore) -> None:
        self._store = store
        self._waiting: dict[Payer, _Sums] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._executor: ThreadPoolExecutor | None = None
        self._warned = False

    def add(
        self,
        payer: Payer,
        *,
        success: bool,
        seconds: float,
        cpu_percent: float | None,
        memory_mb_peak: float | None,
        gpu_memory_mb_peak: float | None,
        usage: Mapping[str, float],
    ) -> None:
        """Take note of a call; it is in the store half a second later, or when the `records` are asked for."""
        sums = self._waiting.get(payer)
        if sums is None:
            sums = self._waiting[payer] = _Sums()
        sums.calls += 1
        sums.successes += success
        sums.seconds += seconds
        sums.cpu.add(cpu_percent)
        sums.memory.add(memory_mb_peak)
        sums.gpu.add(gpu_memory_mb_peak)
        add_usage(sums.usage, usage)
        if self._timer is None:
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

    async def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        async with self._writing:
            waiting, self._waiting = self._waiting, {}
            if not waiting:
                return
            try:
                await self._apart(self._store.add, [sums.record(payer) for payer, sums in waiting.items()])
            except StoreError as error:
                if not self._warned:
                    self._warned = True
                    _logger.warning("what calls took is not recorded: %s", error)

    async def _apart(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="empirical")
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)
