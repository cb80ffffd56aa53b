"""Five lines to a host: find plugins, load them, and put a queue before them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from plugin_substrate.errors import PluginError, PluginNotLoadedError
from plugin_substrate.manager import PluginBinding, PluginManager
from plugin_substrate.queue.job_queue import JobQueue
from plugin_substrate.scheduling import ResourceScheduler

_logger = logging.getLogger(__name__)

PluginSpec = str | tuple[str, Mapping[str, Any] | None] | Mapping[str, Any]


@dataclass(kw_only=True)
class Pipeline:
    """A manager, its queue, and a binding for each plugin that was loaded; ``failed`` says why others were not.

    Entering starts the queue; leaving stops it and unloads everything.
    """

    manager: PluginManager
    queue: JobQueue
    bindings: dict[str, PluginBinding] = field(default_factory=dict)
    failed: dict[str, PluginError] = field(default_factory=dict)

    async def __aenter__(self) -> Pipeline:
        try:
            await self.queue.start()
        except BaseException:
            await self.manager.unload_all_async()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.queue.close()
        finally:
            await self.manager.unload_all_async()


async def create_pipeline(
    plugins: Sequence[PluginSpec],
    *,
    data_dir: Path,
    scheduler: ResourceScheduler | None = None,
    system_monitor: str | None = None,
    search_paths: Sequence[Path] = (),
    queue_kwargs: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> Pipeline:
    """Load plugins and return a pipeline whose queue is not started; use it with ``async with``.

    A plugin is a name, a (name, configuration) pair, or an object with ``name`` and maybe ``config``; anything else is
    a ValueError. One that is not found or cannot be loaded is logged, stands in `Pipeline.failed` and stops no other.
    ``system_monitor`` names one of them; ``queue_kwargs`` go to `JobQueue`. An error here leaves no process.
    """
    wanted = [_named(spec) for spec in plugins]
    manager = PluginManager(data_dir=data_dir, search_paths=search_paths, scheduler=scheduler)
    try:
        queue = JobQueue(manager, **(queue_kwargs or {}))
        pipeline = Pipeline(manager=manager, queue=queue)
        manager.discover_manifests()
        for name, config in wanted:
            try:
                await _load(manager, name, config, strict=strict)
            except PluginError as error:
                _logger.exception("plugin %s could not be loaded", name)
                pipeline.failed[name] = error
            else:
                pipeline.bindings[name] = manager.bind(name)
        if system_monitor is not None:
            manager.register_system_monitor(system_monitor)
    except BaseException:
        await manager.unload_all_async()
        raise
    return pipeline


async def _load(manager: PluginManager, name: str, config: Mapping[str, Any] | None, *, strict: bool) -> None:
    meta = manager.get_discovered_meta(name)
    if meta is None:
        raise PluginNotLoadedError(f"no plugin {name!r} was found")
    await manager.load_plugin_async(meta, config, strict=strict)


def _named(spec: PluginSpec) -> tuple[str, Mapping[str, Any] | None]:
    if isinstance(spec, str):
        return spec, None
    if isinstance(spec, Mapping):
        name, config = spec.get("name"), spec.get("config")
        known = not set(spec) - {"name", "config"}
    else:
        (name, config), known = spec, True
    if known and isinstance(name, str) and (config is None or isinstance(config, Mapping)):
        return name, config
    raise ValueError(f"a plugin is a name, a (name, config) pair or an object with name and config, not {spec!r:.200}")
