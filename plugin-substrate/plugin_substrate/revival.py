"""When a worker that died is replaced, and how much patience a crash loop meets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum

from plugin_substrate.errors import PluginError, PluginNotLoadedError

_FIRST_SECONDS = 0.1
_LONGEST_SECONDS = 30.0
_SETTLED_SECONDS = 60.0

_logger = logging.getLogger(__name__)


class Revival(StrEnum):
    """When a worker that died gets a successor. What was sent to the dead one is never sent again."""

    ON_CALL = "on_call"  #: with the next call, at once
    AT_ONCE = "at_once"  #: without waiting for a call; more and more slowly when it keeps dying


class Backoff:
    """The pauses between revivals: none before the first, then doubling up to 30 s, until one has lived for 60 s."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = 0.0
        self._born = clock()

    def born(self) -> None:
        """Note that a worker began to live."""
        self._born = self._clock()

    def pause(self) -> float:
        """Return how long to wait before the next revival, in seconds."""
        if self._clock() - self._born >= _SETTLED_SECONDS:
            self._pause = 0.0
        pause = self._pause
        self._pause = min(max(_FIRST_SECONDS, 2 * pause), _LONGEST_SECONDS)
        return pause


class Reviver:
    """Brings a worker back without a call. Belongs to one event loop."""

    def __init__(self, revive: Callable[[], Awaitable[object]]) -> None:
        self._revive = revive
        self._backoff = Backoff()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def born(self) -> None:
        """Note that a worker began to live."""
        self._backoff.born()

    def died(self) -> None:
        """Begin to bring the worker back, unless that is going on."""
        if not self._stopped and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._bring_back())

    def stop(self) -> None:
        """Bring nothing back any more."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def _bring_back(self) -> None:
        while True:
            await asyncio.sleep(self._backoff.pause())
            try:
                await self._revive()
            except PluginNotLoadedError:
                return
            except PluginError as error:
                _logger.warning("a worker that died cannot be brought back yet: %s", error)
            else:
                return
