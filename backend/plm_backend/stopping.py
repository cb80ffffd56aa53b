"""SIGINT and SIGTERM: while a command prepares they end it at once, afterwards they ask for an orderly end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """What the signals of one process ask for. Only the first counts, so nobody interrupts the tidying up.

    Raises:
        KeyboardInterrupt: by the signal itself, as long as nobody has begun to `wait`.
    """

    def __init__(self) -> None:
        self._requested = False
        self._wake: Callable[[], object] | None = None

    def listen(self) -> None:
        """Take the two signals over; in the main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    async def wait(self) -> None:
        """Return when the process is asked to stop."""
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        self._wake = lambda: loop.is_closed() or loop.call_soon_threadsafe(stopped.set)
        if not self._requested:
            await stopped.wait()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        first, self._requested = not self._requested, True
        if self._wake is not None:
            self._wake()
        elif first:
            raise KeyboardInterrupt
