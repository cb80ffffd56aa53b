"""Verbs that operate what is loaded: on and off, fetching ahead, logs, and the system's state through a monitor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from plugin_substrate.errors import PluginError, PluginTimeoutError
from plugin_substrate.log_file import read_tail
from plugin_substrate.managing.configuring import ConfiguringVerbs
from plugin_substrate.worker_folder import tenant_log

_logger = logging.getLogger(__name__)


class OperatingVerbs(ConfiguringVerbs):
    """Operate what is loaded."""

    async def enable_plugin_async(self, instance_id: str) -> bool:
        """Have an instance take calls again, and tell whether it did not; ``on_enable`` fires only then."""
        return await self._switch(instance_id, enabled=True)

    async def disable_plugin_async(self, instance_id: str) -> bool:
        """Have an instance take no new calls, and tell whether it did.

        Its worker stays; ``on_disable`` fires when the last running call has ended. What was set is kept for the
        plugin's default instance.
        """
        return await self._switch(instance_id, enabled=False)

    def enable_plugin(self, instance_id: str) -> bool:
        """Enable synchronously; False when nothing has this id."""
        return self._switched(instance_id, enabled=True)

    def disable_plugin(self, instance_id: str) -> bool:
        """Disable synchronously; False when nothing has this id."""
        return self._switched(instance_id, enabled=False)

    async def prefetch_async(
        self,
        instance_id: str,
        *,
        tenant_id: str = "",
        on_progress: Callable[[float, str], object] | None = None,
    ) -> bool:
        """Have a plugin fetch what its calls will need; True when it has.

        There is no limit but this: when what it reports does not change for the manager's
        ``prefetch_stall_threshold_seconds``, the worker is ended, with all that runs in it, and a `PluginTimeoutError`
        says so. What else can go wrong is the error of the plugin, or of its worker's end.
        """
        self._home.adopt()
        instance = self._instances.get(instance_id)
        await instance.load(tenant_id)
        threshold, last = self._prefetch_stall_seconds, (0.0, "")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(threshold) as patience:

                def heard(progress: float, message: str) -> None:
                    nonlocal last
                    if (progress, message) != last:
                        last = progress, message
                        patience.reschedule(loop.time() + threshold)
                    if on_progress is not None:
                        on_progress(progress, message)

                await instance.ask("prefetch", on_progress=heard, tenant_id=tenant_id)
        except TimeoutError:
            await instance.kill_worker(tenant_id)
            raise PluginTimeoutError(
                f"prefetch of {instance_id!r} has not moved on for {threshold} s (last: {last[0]:.0%} {last[1]}), "
                "so its worker was ended",
                timeout_seconds=threshold,
                outcome_known=False,
            ) from None
        return True

    def prefetch(self, instance_id: str) -> bool:
        """Like `prefetch_async`, synchronously."""
        return self._home.run(lambda: self.prefetch_async(instance_id))

    def get_plugin_logs(self, instance_id: str, lines: int = 50, *, tenant_id: str = "") -> str:
        """Return the last lines of an instance's log, of one tenant's worker; also after it was unloaded.

        "No logs found." when there are none. The plugin wrote them: they hold no control characters, and its text
        stands only after the bar of each line.
        """
        return read_tail(tenant_log(self._log_path(instance_id), tenant_id), lines)

    async def get_system_status_async(self, instance_id: str) -> dict[str, Any]:
        """Return what a system monitor says of the machine; a `PluginInputError` when the plugin is none."""
        self._home.adopt()
        status = await self._instances.get(instance_id).ask("get_system_status")
        return status if isinstance(status, dict) else {}

    def get_system_status(self, instance_id: str) -> dict[str, Any]:
        """Like `get_system_status_async`, synchronously."""
        return self._home.run(lambda: self.get_system_status_async(instance_id))

    async def list_processes_async(self, instance_id: str) -> list[Any]:
        """Return the processes that a system monitor lists; a `PluginInputError` when the plugin is none."""
        self._home.adopt()
        found = await self._instances.get(instance_id).ask("list_processes")
        return found if isinstance(found, list) else []

    def list_processes(self, instance_id: str) -> list[Any]:
        """Like `list_processes_async`, synchronously."""
        return self._home.run(lambda: self.list_processes_async(instance_id))

    async def _switch(self, instance_id: str, *, enabled: bool) -> bool:
        self._home.adopt()
        instance = self._instances.get(instance_id)
        async with instance.keeping:
            await self._persist(instance, enabled)
            return await instance.switch.set(enabled=enabled)

    def _switched(self, instance_id: str, *, enabled: bool) -> bool:
        try:
            self._home.run(lambda: self._switch(instance_id, enabled=enabled))
        except PluginError:
            _logger.exception("%s could not be %s", instance_id, "enabled" if enabled else "disabled")
            return False
        return True
