"""Whether an instance takes calls, and its hooks, which fire only on a change and never beside a call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from plugin_substrate.errors import PluginDisabledError, PluginError

_logger = logging.getLogger(__name__)


class Switch:
    """Counts the calls of one instance. Belongs to one event loop.

    ``fire`` sends a hook to the plugin; what goes wrong there is logged.
    """

    def __init__(self, instance_id: str, plugin_name: str, *, enabled: bool, fire: Callable[[str], Awaitable[object]]):
        self._instance_id = instance_id
        self._plugin_name = plugin_name
        self._enabled = enabled
        self._told = enabled
        self._fire = fire
        self._calls = 0
        self._turn = asyncio.Lock()
        self._hooks: set[asyncio.Task[None]] = set()

    @property
    def enabled(self) -> bool:
        """Whether new calls are taken."""
        return self._enabled

    @property
    def calls(self) -> int:
        """How many calls were taken and have not ended."""
        return self._calls

    def enter(self) -> None:
        """Take a call, which must `leave` once; a `PluginDisabledError` when none are taken."""
        if not self._enabled:
            raise PluginDisabledError(
                f"{self._instance_id!r} is disabled; enable_plugin({self._instance_id!r}) makes it take calls again",
                plugin_name=self._plugin_name,
            )
        self._calls += 1

    def leave(self) -> None:
        """Note the end of a call; the last one lets a hook fire that waited for it."""
        self._calls -= 1
        if not self._calls and not self._enabled and self._told:
            task = asyncio.get_running_loop().create_task(self._tell())
            self._hooks.add(task)
            task.add_done_callback(self._hooks.discard)

    async def set(self, enabled: bool) -> bool:
        """Switch, and tell whether that was a change. ``on_disable`` fires when the last running call has ended."""
        changed, self._enabled = enabled != self._enabled, enabled
        if changed:
            await self._tell()
        return changed

    async def _tell(self) -> None:
        """Tell the plugin what it has not been told yet, unless calls still run."""
        async with self._turn:
            if self._told == self._enabled or (not self._enabled and self._calls):
                return
            self._told = self._enabled
            hook = "on_enable" if self._enabled else "on_disable"
            try:
                await self._fire(hook)
            except (PluginError, TimeoutError):
                _logger.exception("%s of %r failed", hook, self._instance_id)
