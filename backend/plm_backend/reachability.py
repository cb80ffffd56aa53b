"""Whether the database answers, for those in this process who wait for it or give up on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from plm_shared.cancellation import kept_cancel

logger = logging.getLogger(__name__)


class Reachability:
    """Told by one who holds a connection all the time; each change is logged once, however long it lasts."""

    def __init__(self, *, on_return: Callable[[], Awaitable[object]]) -> None:
        self._on_return = on_return
        self._reachable = asyncio.Event()
        self._unreachable = asyncio.Event()

    async def found(self) -> None:
        """The database answers; `on_return` is awaited when it did not before."""
        if self._unreachable.is_set():
            logger.warning("the database is back")
            self._unreachable.clear()
            with kept_cancel():
                await self._on_return()
        self._reachable.set()

    def lost(self, error: Exception) -> None:
        """The database does not answer."""
        if not self._unreachable.is_set():
            reason = " ".join(str(error).split())
            logger.warning("the database cannot be reached; it is tried again until it is back: %s", reason)
            self._reachable.clear()
            self._unreachable.set()

    async def given_up(self, patience_seconds: float) -> None:
        """Return once the database has been unreachable for so long at a stretch."""
        while True:
            await self._unreachable.wait()
            try:
                async with asyncio.timeout(patience_seconds):
                    await self._reachable.wait()
            except TimeoutError:
                return
