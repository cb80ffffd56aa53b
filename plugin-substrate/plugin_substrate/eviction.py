"""Which worker goes when another one needs its memory: idle ones only, the one used least recently first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from plugin_substrate.scheduling import GPU_MEMORY
from plugin_substrate.tenant_worker import TenantWorker
from plugin_substrate.worker_pool import WorkerPool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An idle worker, and what its end would give back. ``gpu_mb`` is None when nobody could say."""

    worker: TenantWorker
    pool: WorkerPool
    memory_mb: float = 0.0
    gpu_mb: float | None = None

    def frees(self, resource: str) -> bool:
        """Whether its end gives back anything of a resource; in doubt it does."""
        held = self.gpu_mb if resource == GPU_MEMORY else self.memory_mb
        return held is None or held > 0


def eviction_order(candidates: Iterable[Candidate], resource: str) -> list[Candidate]:
    """Return those whose end would help, the least recently used first; of equals the one that holds most first."""
    helpful = [candidate for candidate in candidates if candidate.frees(resource)]

    def key(candidate: Candidate) -> tuple[float, float]:
        held = (candidate.gpu_mb or 0.0) if resource == GPU_MEMORY else candidate.memory_mb
        return candidate.worker.last_used, -held

    return sorted(helpful, key=key)


async def evict(candidate: Candidate) -> bool:
    """End an idle worker, with its plugin's cleanup, and return when its process is gone; False when it was taken."""
    if candidate.worker.holders or candidate.worker.closed:
        return False
    await candidate.pool.retire(candidate.worker)
    return True
