"""Verbs that measure what is loaded: processes now, GPUs through a monitor, and what calls took so far."""

from __future__ import annotations

from plugin_substrate.managing.state import ManagerState
from plugin_substrate.stores.empirical import EmpiricalResourceRecord
from plugin_substrate.telemetry import PluginStats, ResourceSnapshot, snapshot_of, worker_stats


class MeasuringVerbs(ManagerState):
    """Measure what is loaded."""

    async def get_plugin_stats_async(self, instance_id: str) -> PluginStats:
        """Measure an instance now: its processes from outside, and what each worker says of itself.

        A `PluginNotLoadedError` when there is none. A worker that does not answer within a second, being deep in C
        code, is measured from outside alone.
        """
        self._home.adopt()
        workers = self._instances.get(instance_id).workers
        return PluginStats(instance_id=instance_id, workers=await worker_stats(workers))

    def get_plugin_stats(self, instance_id: str) -> PluginStats:
        """Like `get_plugin_stats_async`, synchronously."""
        return self._home.run(lambda: self.get_plugin_stats_async(instance_id))

    async def get_resource_snapshot_async(self, instance_id: str) -> ResourceSnapshot:
        """Measure an instance now, with what the registered monitor says of GPUs."""
        stats = await self.get_plugin_stats_async(instance_id)
        reading = await self._instances.allocator.read()
        return snapshot_of(stats, reading.processes, reading.status)

    def get_resource_snapshot(self, instance_id: str) -> ResourceSnapshot:
        """Like `get_resource_snapshot_async`, synchronously."""
        return self._home.run(lambda: self.get_resource_snapshot_async(instance_id))

    def register_system_monitor(self, instance_id: str) -> None:
        """Take figures of GPUs and memory from a loaded plugin that has `get_system_status` and `list_processes`.

        A `PluginNotLoadedError` when there is none of this id. Once it is unloaded, figures are missing.
        """
        self._instances.get(instance_id)
        self._instances.allocator.register_monitor(instance_id, lambda verb: self._instances.get(instance_id).ask(verb))

    async def get_empirical_records_async(self, instance_id: str | None = None) -> list[EmpiricalResourceRecord]:
        """Return what the calls of one instance, or of all, took, those that just ended included.

        A `StoreError` when the store cannot be read. Without tracking there is nothing.
        """
        self._home.adopt()
        records = await self._recorder.records() if self._recorder else []
        return [record for record in records if instance_id in (None, record.instance_id)]

    def get_empirical_records(self, instance_id: str | None = None) -> list[EmpiricalResourceRecord]:
        """Like `get_empirical_records_async`, synchronously."""
        return self._home.run(lambda: self.get_empirical_records_async(instance_id))
