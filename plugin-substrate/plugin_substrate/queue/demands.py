"""What the jobs of each instance need: what its manifest states, and of memory what its calls were seen to take."""

from __future__ import annotations

import asyncio

from plugin_substrate.errors import PluginNotLoadedError, ResourceShortfall, StoreError
from plugin_substrate.manager import PluginManager
from plugin_substrate.metadata import CallTerms
from plugin_substrate.queue.resources import NO_DEMAND, Demand, Ledger, demand_of
from plugin_substrate.requirements import ResourceRequirements
from plugin_substrate.scheduling import SYSTEM_MEMORY

_FRESH_SECONDS = 60.0


class Demands:
    """Asks the manager, and for measured memory at most once a minute and instance."""

    def __init__(self, manager: PluginManager, ledger: Ledger) -> None:
        self._manager = manager
        self._ledger = ledger
        self._stated: dict[str, tuple[ResourceRequirements, Demand]] = {}  # by instance; jobs share one object
        self._measured: dict[str, tuple[float, float]] = {}  # by instance: when, and the peak in MB

    def of(self, terms: CallTerms) -> Demand:
        """Return what a job takes."""
        stated = self._stated_by(terms)
        if SYSTEM_MEMORY not in stated.per_worker:
            return stated
        _, peak = self._measured.get(terms.instance_id, (0.0, 0.0))
        measured = stated.at_least(SYSTEM_MEMORY, peak)
        # What was measured may be more than there is, as the kernel swaps and shares; that is no reason never to start.
        return stated if self._ledger.too_big(measured) else measured

    def too_big(self, terms: CallTerms) -> ResourceShortfall | None:
        """Return what this machine could never give a job of an instance, None when it can."""
        return self._ledger.too_big(self._stated_by(terms))

    async def measure(self, instance_id: str) -> None:
        """Learn what the calls of an instance took so far, if it says that it needs memory."""
        now = asyncio.get_running_loop().time()
        when, _ = self._measured.get(instance_id, (-_FRESH_SECONDS, 0.0))
        if now - when < _FRESH_SECONDS:
            return
        try:
            terms = self._manager.terms_of(instance_id)
            self._measured[instance_id] = now, self._measured.get(instance_id, (0.0, 0.0))[1]
            if not terms.resources.min_system_ram_mb:
                return
            records = await self._manager.get_empirical_records_async(instance_id)
        except (PluginNotLoadedError, StoreError):
            return
        peak = max((record.memory_mb_peak_max or 0.0 for record in records), default=0.0)
        self._measured[instance_id] = now, peak

    def _stated_by(self, terms: CallTerms) -> Demand:
        """What the manifest states, worked out once for each that an instance is loaded with."""
        resources, demand = self._stated.get(terms.instance_id, (None, NO_DEMAND))
        if resources is not terms.resources:
            demand = demand_of(terms.resources)
            self._stated[terms.instance_id] = terms.resources, demand
        return demand
