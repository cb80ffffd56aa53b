"""What loaded plugins take: figures of their process trees, of the workers themselves, and of a monitor's GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from plugin_substrate.errors import PluginError
from plugin_substrate.interface import is_amount
from plugin_substrate.process_tree import tree_usage
from plugin_substrate.tenant_worker import TenantWorker

_MB = 1 << 20
_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class WorkerStats:
    """One worker at one moment. Memory is in MB (of 2**20 bytes); None is a figure that nobody could give.

    ``memory_rss_mb`` and ``cpu_percent`` are of the worker and its living descendants; the percentage is the mean since
    the worker was asked before, 0 the first time. ``memory_uss_mb`` and ``memory_peak_mb`` are what the worker's own
    process says of itself, the peak that of its whole life; ``supervisor_uss_mb`` is what the plugin's supervisor says.
    """

    tenant_id: str
    shared: bool
    pid: int
    subtree_pids: tuple[int, ...]
    running_calls: int
    cpu_percent: float
    memory_rss_mb: float
    memory_uss_mb: float | None
    memory_peak_mb: float | None
    supervisor_uss_mb: float | None


@dataclass(frozen=True, kw_only=True)
class PluginStats:
    """What one instance takes, its workers added up."""

    instance_id: str
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))
    workers: tuple[WorkerStats, ...]

    @property
    def cpu_percent(self) -> float:
        """The sum over its workers."""
        return sum(worker.cpu_percent for worker in self.workers)

    @property
    def memory_rss_mb(self) -> float:
        """The sum over its workers."""
        return sum(worker.memory_rss_mb for worker in self.workers)

    @property
    def subtree_pids(self) -> tuple[int, ...]:
        """All processes of its workers."""
        return tuple(pid for worker in self.workers for pid in worker.subtree_pids)


@dataclass(frozen=True, kw_only=True)
class ResourceSnapshot:
    """What one instance takes, GPU included. GPU figures are None without a monitor, and 0 when it lists none.

    ``gpu_index`` is the GPU of which most is held; total, load and type are that one's.
    """

    timestamp: datetime
    worker_pid: int | None
    cpu_percent: float
    memory_rss_mb: float
    gpu_index: int | None = None
    gpu_memory_mb: float | None = None
    gpu_type: str | None = None
    gpu_total_mb: float | None = None
    gpu_load_percent: float | None = None


def snapshot_of(stats: PluginStats, processes: Sequence[Any] | None, status: Mapping[str, Any]) -> ResourceSnapshot:
    """Return the figures of an instance as one line, with those of a monitor unless ``processes`` is None."""
    gpus = {} if processes is None else attribute_gpus(stats.subtree_pids, processes, status)
    return ResourceSnapshot(
        timestamp=stats.timestamp,
        worker_pid=stats.workers[0].pid if stats.workers else None,
        cpu_percent=stats.cpu_percent,
        memory_rss_mb=stats.memory_rss_mb,
        **gpus,
    )


async def worker_stats(workers: Iterable[TenantWorker]) -> tuple[WorkerStats, ...]:
    """Measure the workers that have a process, side by side."""
    return tuple(await asyncio.gather(*(_measure(worker) for worker in workers if worker.alive)))


async def _measure(worker: TenantWorker) -> WorkerStats:
    view = worker.view()
    pid = view.pid or 0
    tree = await asyncio.to_thread(tree_usage, pid)
    own = await _figures(worker.proxy.ask("stats")) if worker.proxy is not None else {}
    supervisor = await _figures(worker.supervisor_stats())
    return WorkerStats(
        tenant_id=view.tenant_id,
        shared=view.shared,
        pid=pid,
        subtree_pids=tree.pids,
        running_calls=view.running_calls,
        cpu_percent=worker.cpu_clock.percent(pid, tree.cpu_seconds),
        memory_rss_mb=tree.resident_bytes / _MB,
        memory_uss_mb=_megabytes(own.get("unique_bytes")),
        memory_peak_mb=_megabytes(own.get("peak_bytes")),
        supervisor_uss_mb=_megabytes(supervisor.get("unique_bytes")),
    )


async def _figures(asked: Awaitable[Any]) -> Mapping[str, Any]:
    """Wait for an answer; who does not give it in time, being deep in C code, or dies, has nothing to say."""
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            answer = await asked
    except (PluginError, TimeoutError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _megabytes(value: Any) -> float | None:
    return value / _MB if is_amount(value) else None


def attribute_gpus(pids: Sequence[int], processes: Any, status: Any) -> dict[str, Any]:
    """Return the GPU fields of a `ResourceSnapshot` for some processes, from what a monitor plugin answered.

    ``processes`` are objects with ``pid``, ``gpu_index`` and ``gpu_memory_mb``; ``status`` may hold ``gpus``, objects
    with ``index``, ``type``, ``total_mb`` and ``load_percent``. A plugin says this: what has another shape is not used.
    """
    held: dict[int, float] = {}
    for process in processes if isinstance(processes, list) else []:
        match process:
            case {"pid": int(pid), "gpu_index": int(index), "gpu_memory_mb": amount} if pid in pids and is_amount(
                amount
            ):
                held[index] = held.get(index, 0.0) + amount
    if not held:
        return {"gpu_memory_mb": 0.0}
    largest = max(held, key=lambda index: held[index])
    return {"gpu_index": largest, "gpu_memory_mb": sum(held.values()), **_describe_gpu(largest, status)}


def _describe_gpu(index: int, status: Any) -> dict[str, Any]:
    gpus = status.get("gpus") if isinstance(status, dict) else None
    for gpu in gpus if isinstance(gpus, list) else []:
        if isinstance(gpu, dict) and gpu.get("index") == index:
            kind, total, load = gpu.get("type"), gpu.get("total_mb"), gpu.get("load_percent")
            return {
                "gpu_type": kind if isinstance(kind, str) else None,
                "gpu_total_mb": total if is_amount(total) else None,
                "gpu_load_percent": load if is_amount(load) else None,
            }
    return {}
