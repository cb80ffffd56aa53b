"""The signals of a command that goes on until it is stopped.

SIGINT and SIGTERM end it at once while it prepares, and afterwards ask for an orderly end. SIGHUP asks for the files of
the operator to be read anew; where it says that the terminal of the command is gone, it asks for the end too.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """What SIGINT and SIGTERM ask for. Only the first counts, so nobody interrupts the tidying up.

    Raises:
        KeyboardInterrupt: by the signal itself, as long as nobody has begun to `wait`.
    """

    def __init__(self) -> None:
        self._requested = False
        self._wake: Callable[[], object] | None = None

    def listen(self) -> None:
        """Take the two signals over; in the main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.request())

    def request(self) -> None:
        """Ask for the end, as the signals do."""
        first, self._requested = not self._requested, True
        if self._wake is not None:
            self._wake()
        elif first:
            raise KeyboardInterrupt

    async def wait(self) -> None:
        """Return when the process is asked to stop."""
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        self._wake = lambda: loop.is_closed() or loop.call_soon_threadsafe(stopped.set)
        if not self._requested:
            await stopped.wait()


class ReloadRequest:
    """What SIGHUP asks for. One that comes before anybody waits, or while the last one is carried out, is kept.

    `stop` is asked in its place when the terminal is gone.
    """

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._requested = False
        self._from_terminal = False
        self._wake: Callable[[], object] | None = None

    def listen(self) -> None:
        """Take the signal over; in the main thread only."""
        self._from_terminal = _has_terminal()
        signal.signal(signal.SIGHUP, self._on_signal)

    async def wait(self) -> None:
        """Return when a reload is asked for that was not answered yet."""
        asked, loop = asyncio.Event(), asyncio.get_running_loop()
        self._wake = lambda: loop.is_closed() or loop.call_soon_threadsafe(asked.set)
        if not self._requested:
            await asked.wait()
        self._requested = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._from_terminal and not _has_terminal():
            self._stop.request()
            return
        self._requested = True
        if self._wake is not None:
            self._wake()


def _has_terminal() -> bool:
    """Whether this process has a terminal that could hang up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
