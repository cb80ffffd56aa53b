"""One plugin of a manager, with the manager's verbs and without its name in each."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping
from typing import TYPE_CHECKING, Any

from plugin_substrate.errors import PluginNotLoadedError
from plugin_substrate.interface import FieldOptions
from plugin_substrate.metadata import PluginInstance, PluginMeta
from plugin_substrate.telemetry import PluginStats

if TYPE_CHECKING:
    from plugin_substrate.manager import PluginManager


class PluginBinding:
    """A plugin's default instance. Holds nothing: two bindings of one name are the same."""

    def __init__(self, manager: PluginManager, name: str, default_config: Mapping[str, Any] | None = None) -> None:
        self._manager = manager
        self._default_config = default_config
        self.name = name

    @property
    def is_loaded(self) -> bool:
        """Whether it can be called."""
        return any(instance.instance_id == self.name for instance in self._manager.list_instances())

    async def load_async(self, config: Mapping[str, Any] | None = None, **options: Any) -> PluginInstance:
        """Load it, with the default configuration unless another is given, see `PluginManager.load_plugin_async`."""
        return await self._manager.load_plugin_async(self._meta(), config or self._default_config, **options)

    def load(self, config: Mapping[str, Any] | None = None, **options: Any) -> bool:
        """Load it, see `PluginManager.load_plugin`."""
        return self._manager.load_plugin(self._meta(), config or self._default_config, **options)

    async def unload_async(self) -> bool:
        """Unload it; False when it is not loaded."""
        return await self._manager.unload_plugin_async(self.name)

    def unload(self) -> bool:
        """Unload it; False when it is not loaded."""
        return self._manager.unload_plugin(self.name)

    async def reload_async(self, config: Mapping[str, Any] | None = None) -> PluginInstance:
        """Replace its workers, see `PluginManager.reload_plugin_async`."""
        return await self._manager.reload_plugin_async(self.name, config)

    def reload(self, config: Mapping[str, Any] | None = None) -> bool:
        """Replace its workers, see `PluginManager.reload_plugin`."""
        return self._manager.reload_plugin(self.name, config)

    async def execute_async(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, see `PluginManager.execute_plugin_async`."""
        return await self._manager.execute_plugin_async(self.name, *args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, see `PluginManager.execute_plugin`."""
        return self._manager.execute_plugin(self.name, *args, **kwargs)

    def execute_stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """Call it for chunks, see `PluginManager.execute_plugin_stream`."""
        return self._manager.execute_plugin_stream(self.name, *args, **kwargs)

    def execute_stream_sync(self, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        """Call it for chunks, see `PluginManager.execute_plugin_stream_sync`."""
        return self._manager.execute_plugin_stream_sync(self.name, *args, **kwargs)

    async def prefetch_async(self) -> bool:
        """Have it fetch what its calls will need, see `PluginManager.prefetch_async`."""
        return await self._manager.prefetch_async(self.name)

    def prefetch(self) -> bool:
        """Have it fetch what its calls will need, see `PluginManager.prefetch_async`."""
        return self._manager.prefetch(self.name)

    def enable(self) -> bool:
        """Have it take calls; False when it is not loaded."""
        return self._manager.enable_plugin(self.name)

    def disable(self) -> bool:
        """Have it take no calls; False when it is not loaded."""
        return self._manager.disable_plugin(self.name)

    async def update_config_async(self, config: Mapping[str, Any], *, strict: bool = True) -> PluginInstance:
        """Change its configuration, see `PluginManager.update_plugin_config_async`."""
        return await self._manager.update_plugin_config_async(self.name, config, strict=strict)

    def update_config(self, config: Mapping[str, Any], *, strict: bool = True) -> bool:
        """Change its configuration, see `PluginManager.update_plugin_config`."""
        return self._manager.update_plugin_config(self.name, config, strict=strict)

    def get_config(self) -> dict[str, Any]:
        """Return its whole configuration."""
        return self._manager.get_plugin_config(self.name)

    def get_config_schema(self) -> dict[str, Any]:
        """Return the schema of its configuration."""
        return self._manager.get_plugin_config_schema(self.name)

    def get_config_options(self) -> dict[str, FieldOptions]:
        """Return what its settings may be at the moment."""
        return self._manager.get_config_options(self.name)

    async def reconfigure_async(self, config: Mapping[str, Any], *, strict: bool = True) -> PluginInstance:
        """Change its configuration until it is unloaded, see `PluginManager.reconfigure_async`."""
        return await self._manager.reconfigure_async(self.name, config, strict=strict)

    def reconfigure(self, config: Mapping[str, Any], *, strict: bool = True) -> PluginInstance:
        """Change its configuration until it is unloaded, see `PluginManager.reconfigure_async`."""
        return self._manager.reconfigure(self.name, config, strict=strict)

    @property
    def is_alive(self) -> bool:
        """Whether it has a live worker; one that died is replaced at the next call."""
        return any(view.alive for view in self._manager.list_instances() if view.instance_id == self.name)

    def get_stats(self) -> PluginStats:
        """Measure it, see `PluginManager.get_plugin_stats_async`."""
        return self._manager.get_plugin_stats(self.name)

    def get_system_status(self) -> dict[str, Any]:
        """Return what it says of the machine, if it is a system monitor."""
        return self._manager.get_system_status(self.name)

    def list_processes(self) -> list[Any]:
        """Return the processes it lists, if it is a system monitor."""
        return self._manager.list_processes(self.name)

    # Names that the handle of a worker had in the published system; every call reports deaths and shortages by now.
    execute_with_oom_check = execute
    execute_with_oom_check_async = execute_async
    get_current_config = get_config
    config_options = get_config_options
    cleanup = unload

    def get_logs(self, lines: int = 50) -> str:
        """Return the last lines of its log."""
        return self._manager.get_plugin_logs(self.name, lines)

    def _meta(self) -> PluginMeta:
        meta = self._manager.get_discovered_meta(self.name)
        if meta is None:
            raise PluginNotLoadedError(f"no plugin is discovered as {self.name!r}; call discover_manifests() first")
        return meta
