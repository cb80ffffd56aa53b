"""The instances of one host: which are there, which are coming and which are going."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from plugin_substrate.allocation import ResourceAllocator
from plugin_substrate.call_books import CallBooks
from plugin_substrate.errors import PluginNotLoadedError
from plugin_substrate.instance import LoadedInstance
from plugin_substrate.metadata import PluginMeta
from plugin_substrate.recorder import EmpiricalRecorder
from plugin_substrate.scheduling import ResourceScheduler
from plugin_substrate.supervisors import Key, SupervisorPool
from plugin_substrate.templates import TemplateTable
from plugin_substrate.tenant_worker import InstanceSettings
from plugin_substrate.worker_pool import WorkerPool


@dataclass(eq=False)
class _Loading:
    task: asyncio.Task[None] = field(init=False)
    instance: LoadedInstance | None = None  # none before it is known what it is loaded with
    given_up: bool = False


class InstanceTable:
    """Loads and unloads instances, each in a task of its own: who stops waiting leaves nothing half-done behind.

    Belongs to one event loop.
    """

    def __init__(self, scheduler: ResourceScheduler, recorder: EmpiricalRecorder | None = None) -> None:
        self.allocator = ResourceAllocator(scheduler, self._pools)
        self._books = CallBooks(self.allocator, recorder)
        self._instances: dict[str, LoadedInstance] = {}
        self._loading: dict[str, _Loading] = {}
        self._unloading: set[asyncio.Task[bool]] = set()
        self._supervisors = SupervisorPool()
        self._templates = TemplateTable()

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._instances

    def get(self, instance_id: str) -> LoadedInstance:
        """Return a loaded instance; a `PluginNotLoadedError` when there is none."""
        try:
            return self._instances[instance_id]
        except KeyError:
            raise PluginNotLoadedError(f"no plugin is loaded as {instance_id!r}") from None

    def all(self) -> list[LoadedInstance]:
        """Return the loaded instances."""
        return list(self._instances.values())

    async def load(
        self, instance_id: str, prepare: Callable[[], Awaitable[InstanceSettings]], tenant_id: str = ""
    ) -> None:
        """Load an instance and start a tenant's worker, or wait for the load of its id that is already going on.

        ``prepare`` says what it is loaded with; while that takes time, it can be given up already.
        """
        loading = self._loading.get(instance_id) or self._begin_load(instance_id, prepare, tenant_id)
        await asyncio.shield(loading.task)

    async def unload(self, instance_id: str) -> bool:
        """Unload, giving up a load that is going on; False when nothing has this id."""
        return await asyncio.shield(self._begin_unload(instance_id))

    async def unload_all(self) -> None:
        """Unload everything, and wait for what others are unloading."""
        for instance_id in {*self._instances, *self._loading}:
            self._begin_unload(instance_id)
        ended, _ = await asyncio.wait(self._unloading) if self._unloading else (set(), None)
        await self._books.close()
        for task in ended:
            task.result()

    def _pools(self) -> list[tuple[str, WorkerPool]]:
        return [(instance_id, instance.workers) for instance_id, instance in self._instances.items()]

    def _begin_load(
        self, instance_id: str, prepare: Callable[[], Awaitable[InstanceSettings]], tenant_id: str
    ) -> _Loading:
        loading = self._loading[instance_id] = _Loading()
        loading.task = asyncio.get_running_loop().create_task(self._load(loading, instance_id, prepare, tenant_id))
        loading.task.add_done_callback(_read_exception)
        return loading

    async def _load(
        self,
        loading: _Loading,
        instance_id: str,
        prepare: Callable[[], Awaitable[InstanceSettings]],
        tenant_id: str,
    ) -> None:
        try:
            settings = await prepare()
            if loading.given_up:
                raise PluginNotLoadedError(f"{instance_id!r} was unloaded while it was being loaded")
            key = _supervisor_key(settings.meta)
            self._supervisors.join(key)
            try:
                loading.instance = LoadedInstance(
                    settings, lambda: self._supervisors.get(key), self._templates, self._books
                )
                await loading.instance.load(tenant_id)
                self._instances[instance_id] = loading.instance
            except BaseException:
                await self._supervisors.leave(key)
                raise
        finally:
            del self._loading[instance_id]

    def _begin_unload(self, instance_id: str) -> asyncio.Task[bool]:
        task = asyncio.get_running_loop().create_task(self._unload(instance_id))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)
        return task

    async def _unload(self, instance_id: str) -> bool:
        loading = self._loading.get(instance_id)
        if loading is not None:
            loading.given_up = True
            if loading.instance is not None:
                await loading.instance.close()
            await asyncio.wait({loading.task})
        instance = self._instances.pop(instance_id, None)
        if instance is not None:
            await instance.close()
            await self._supervisors.leave(_supervisor_key(instance.settings.meta))
            self.allocator.something_ended()
        return (loading or instance) is not None


def _supervisor_key(meta: PluginMeta) -> Key:
    return meta.name, meta.manifest.install.python_path


def _read_exception(task: asyncio.Task[None]) -> None:
    """Take note of a failure: whoever awaited the load may have gone away, which must not cause a warning."""
    if not task.cancelled():
        task.exception()
