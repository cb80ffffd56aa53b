"""What a machine has for jobs, what a job takes of it, and who holds what at the moment."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from plugin_substrate.errors import ResourceShortfall
from plugin_substrate.requirements import ResourceRequirements
from plugin_substrate.scheduling import GPU_MEMORY, SYSTEM_MEMORY

CPU_SLOTS = "cpu_slots"
DEVICE = "device:"
TOKEN = "token:"  # noqa: S105 - what a license is counted in

_MB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MachineResources:
    """What the jobs of one queue may take together. Memory is in MB of 2**20 bytes.

    ``devices`` are names, each for one worker at a time; ``tokens`` are the operator's own, such as a license or the
    right to call a service. GPU memory of None is not counted here: a `ResourceScheduler` may still look at it.
    """

    cpu_slots: float
    memory_mb: float
    gpu_memory_mb: float | None = None
    devices: frozenset[str] = frozenset()
    tokens: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_this_machine(cls) -> MachineResources:
        """Return the processors this process may use and the machine's memory, without devices and tokens."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(cpu_slots=float(len(os.sched_getaffinity(0))), memory_mb=memory / _MB)

    def amounts(self) -> dict[str, float]:
        """Return how much there is of each resource that is counted."""
        amounts = {CPU_SLOTS: self.cpu_slots, SYSTEM_MEMORY: self.memory_mb}
        if self.gpu_memory_mb is not None:
            amounts[GPU_MEMORY] = self.gpu_memory_mb
        amounts.update({DEVICE + name: 1.0 for name in self.devices})
        return amounts | {TOKEN + name: amount for name, amount in self.tokens.items()}


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What jobs of one instance take: ``per_job`` each of them, ``per_worker`` all that share a worker together."""

    per_job: Mapping[str, float] = field(default_factory=dict)
    per_worker: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.per_job or self.per_worker)

    def at_least(self, resource: str, amount: float) -> Demand:
        """Return the demand with at least this much per worker."""
        if amount <= self.per_worker.get(resource, 0.0):
            return self
        return replace(self, per_worker={**self.per_worker, resource: amount})


NO_DEMAND = Demand()


def demand_of(needs: ResourceRequirements) -> Demand:
    """Return what a manifest states. A worker's memory and devices serve all of its calls; the rest is per call."""
    per_job = {CPU_SLOTS: needs.cpu_slots} if needs.cpu_slots else {}
    per_job |= {TOKEN + name: amount for name, amount in needs.tokens.items() if amount}
    per_worker = {DEVICE + name: 1.0 for name in needs.devices}
    if needs.min_system_ram_mb:
        per_worker[SYSTEM_MEMORY] = needs.min_system_ram_mb
    if needs.requires_gpu and needs.min_gpu_vram_mb:
        per_worker[GPU_MEMORY] = needs.min_gpu_vram_mb
    return Demand(per_job=per_job, per_worker=per_worker) if per_job or per_worker else NO_DEMAND


class Ledger:
    """Who holds how much of what."""

    def __init__(self, machine: MachineResources) -> None:
        self._capacity = machine.amounts()
        self._used: dict[str, float] = defaultdict(float)
        self._held: dict[str, tuple[Hashable, Mapping[str, float]]] = {}
        self._workers: dict[Hashable, tuple[set[str], Mapping[str, float]]] = {}

    def too_big(self, demand: Demand) -> ResourceShortfall | None:
        """Return what even the idle machine has too little of, None when it could do the job."""
        for resource, needed in _together(demand.per_job, demand.per_worker).items():
            capacity = self._capacity_of(resource)
            if capacity is not None and needed > capacity:
                return ResourceShortfall(resource, needed, capacity)
        return None

    def missing(self, worker: Hashable, demand: Demand) -> ResourceShortfall | None:
        """Return what is short for one more job in a worker, None when it fits."""
        for resource, needed in self._more(worker, demand).items():
            capacity = self._capacity_of(resource)
            if capacity is not None and self._used[resource] + needed > capacity:
                return ResourceShortfall(resource, needed, max(0.0, capacity - self._used[resource]))
        return None

    def needs(self, worker: Hashable, demand: Demand) -> Mapping[str, float]:
        """Return what one more job in a worker would take."""
        return self._more(worker, demand)

    def take(self, worker: Hashable, job_id: str, demand: Demand) -> None:
        """Note that a job starts."""
        for resource, amount in self._more(worker, demand).items():
            self._used[resource] += amount
        jobs, _ = self._workers.setdefault(worker, (set(), demand.per_worker))
        jobs.add(job_id)
        self._held[job_id] = worker, demand.per_job

    def give_back(self, job_id: str) -> None:
        """Note its end; a worker's share goes with the last of its jobs."""
        worker, per_job = self._held.pop(job_id)
        self._less(per_job)
        jobs, per_worker = self._workers[worker]
        jobs.discard(job_id)
        if not jobs:
            self._less(per_worker)
            del self._workers[worker]

    def holders(self, resource: str) -> tuple[str, ...]:
        """Return the jobs that hold some of a resource."""
        return tuple(
            job_id
            for job_id, (worker, per_job) in self._held.items()
            if resource in per_job or resource in self._workers[worker][1]
        )

    def _less(self, amounts: Mapping[str, float]) -> None:
        for resource, amount in amounts.items():
            self._used[resource] -= amount

    def _more(self, worker: Hashable, demand: Demand) -> Mapping[str, float]:
        return demand.per_job if worker in self._workers else _together(demand.per_job, demand.per_worker)

    def _capacity_of(self, resource: str) -> float | None:
        """How much there is; None where it is not counted, and nothing of a device or token nobody has declared."""
        return self._capacity.get(resource, 0.0 if resource.startswith((DEVICE, TOKEN)) else None)


def _together(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
