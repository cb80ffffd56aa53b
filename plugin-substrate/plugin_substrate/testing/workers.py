"""Real plugin workers for tests: a plugin class of the test's own environment, loaded by a real manager."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from plugin_substrate.interface import PluginInterface
from plugin_substrate.manager import PluginManager
from plugin_substrate.metadata import CallResult, PluginInstance, PluginMeta
from plugin_substrate.testing.describe import plugin_meta
from plugin_substrate.testing.leftovers import ProcessMark, descendants

_GONE_SECONDS = 10.0  # a busy machine's

T = TypeVar("T")


class LeftBehindError(AssertionError):
    """Everything was unloaded and some processes of plugins still run; they were killed then."""

    def __init__(self, processes: list[str]) -> None:
        super().__init__(f"every plugin was unloaded, but this still ran: {'; '.join(processes)}")
        self.processes = tuple(processes)


class PluginWorker:
    """One loaded plugin: its calls and its state."""

    def __init__(self, workers: PluginWorkers, instance_id: str) -> None:
        self._workers = workers
        self.instance_id = instance_id

    @property
    def instance(self) -> PluginInstance:
        """The instance as it stands: whether it is alive, its pid, the layers that confine it."""
        return self._workers.manager.get_instance(self.instance_id)

    def call(self, *args: Any, **kwargs: Any) -> CallResult:
        """Call the plugin, outside an event loop, and return value, usage and log lines; see `call_async`."""
        return self.run(lambda: self.call_async(*args, **kwargs))

    async def call_async(self, *args: Any, **kwargs: Any) -> CallResult:
        """Call the plugin with what `PluginManager.execute_call` takes, and return value, usage and log lines."""
        return await self._workers.manager.execute_call(self.instance_id, *args, **kwargs)

    def stream(self, *args: Any, take: int | None = None, **kwargs: Any) -> list[Any]:
        """Stream from the plugin, outside an event loop, and return the chunks; the first ``take`` alone, if given."""
        return self.run(lambda: self.stream_async(*args, take=take, **kwargs))

    async def stream_async(self, *args: Any, take: int | None = None, **kwargs: Any) -> list[Any]:
        """Stream from the plugin with what `PluginManager.execute_plugin_stream` takes, and return the chunks."""
        chunks: list[Any] = []
        async with aclosing(self._workers.manager.execute_plugin_stream(self.instance_id, *args, **kwargs)) as stream:
            while len(chunks) != take:
                try:
                    chunks.append(await anext(stream))
                except StopAsyncIteration:
                    break
        return chunks

    def kill(self) -> None:
        """Kill its process as the system does when memory is short; the next call finds a new one."""
        pid = self.instance.pid
        for process in self._workers.processes():
            if process.pid == pid:
                process.kill()
                process.wait(_GONE_SECONDS)

    def unload(self) -> None:
        """Unload it before the test ends."""
        self.run(lambda: self._workers.manager.unload_plugin_async(self.instance_id))

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run something asynchronous with the manager, outside an event loop."""
        return self._workers.run(work)


class PluginWorkers:
    """A manager for one test, with workers of plugin classes of the test's own environment.

    Used in a with-block, or in an ``async with`` inside an event loop. At its end everything is unloaded, and a
    `LeftBehindError` names every process of theirs that still runs. ``data_dir`` and the further
    options are the manager's; ``environments`` keeps the small virtual environments of the workers, which any number of
    tests may share.
    """

    def __init__(self, data_dir: Path, *, environments: Path | None = None, **manager_options: Any) -> None:
        self.data_dir = data_dir
        self.manager = PluginManager(data_dir=data_dir, **manager_options)
        self._environments = environments or data_dir / "environments"
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)

    def describe(self, plugin: type[PluginInterface] | Mapping[str, Any] | str, **description: Any) -> PluginMeta:
        """Return what installing a plugin would have written, see `plugin_meta`."""
        return plugin_meta(plugin, environments=self._environments, **description)

    def start(
        self,
        plugin: type[PluginInterface] | Mapping[str, Any] | str | PluginMeta,
        config: Mapping[str, Any] | None = None,
        *,
        instance_id: str | None = None,
        max_concurrent_requests: int = 1,
        **description: Any,
    ) -> PluginWorker:
        """Load a plugin in a worker, outside an event loop; raises what a host raises.

        ``plugin`` is a `PluginMeta`, or what `plugin_meta` makes one of, together with ``description``.
        """
        return self.run(
            lambda: self.start_async(
                plugin,
                config,
                instance_id=instance_id,
                max_concurrent_requests=max_concurrent_requests,
                **description,
            )
        )

    async def start_async(
        self,
        plugin: type[PluginInterface] | Mapping[str, Any] | str | PluginMeta,
        config: Mapping[str, Any] | None = None,
        *,
        instance_id: str | None = None,
        max_concurrent_requests: int = 1,
        **description: Any,
    ) -> PluginWorker:
        """Like `start`, inside an event loop."""
        meta = plugin if isinstance(plugin, PluginMeta) else self.describe(plugin, **description)
        instance = await self.manager.load_plugin_async(
            meta, config, instance_id=instance_id, max_concurrent_requests=max_concurrent_requests
        )
        return PluginWorker(self, instance.instance_id)

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run something asynchronous with the manager, outside an event loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._runner.run(work())
        raise RuntimeError("inside an event loop use the form of this method that ends in _async")

    def __enter__(self) -> PluginWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self._close)
        finally:
            self._runner.close()

    async def __aenter__(self) -> PluginWorkers:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        """Unload everything and see that it is gone."""
        processes = self.processes()
        await self.manager.unload_all_async()
        deadline = time.monotonic() + _GONE_SECONDS
        left = [process for process in processes if not process.wait(deadline - time.monotonic())]
        if left:
            described = [str(process) for process in left]
            for process in left:
                process.kill()
            raise LeftBehindError(described)

    def processes(self) -> set[ProcessMark]:
        """Return the supervisors and all that is below them."""
        pids = {instance.supervisor_pid for instance in self.manager.list_instances()} - {None}
        return {process for process in descendants(os.getpid()) if process.pid in pids}.union(
            *(descendants(pid) for pid in pids if pid is not None)
        )
