"""A call from the moment it has a slot until its end: what it reports, and the future of its value."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from plugin_substrate.headers import Spent
from plugin_substrate.interface import CallContext
from plugin_substrate.log_pipe import LOG_TAIL_LINES

_logger = logging.getLogger(__name__)


class PendingCall:
    """A call in a worker, as the host sees it. Belongs to ``loop``, which is the running one unless given."""

    def __init__(
        self,
        context: CallContext,
        *,
        on_progress: Callable[[float, str], object] | None = None,
        on_usage: Callable[[dict[str, float]], object] | None = None,
        on_log: Callable[[str], object] | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.context = context
        self.usage: dict[str, float] = {}
        self.logs: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self.forced = False
        self.answered = False
        self.sent_at: float | None = None
        self.spent = Spent()
        self.value: asyncio.Future[Any] = (loop or asyncio.get_running_loop()).create_future()
        self._waiting: list[asyncio.Future[None]] = []
        self._on_progress = on_progress
        self._on_usage = on_usage
        self._on_log = on_log

    def progress(self, progress: float, message: str) -> None:
        """Pass a progress report on."""
        _tell(self._on_progress, progress, message)

    def replace_usage(self, usage: dict[str, float]) -> None:
        """Keep the latest usage and pass it on."""
        self.usage = usage
        _tell(self._on_usage, dict(usage))

    def log(self, line: str) -> None:
        """Keep a line and pass it on."""
        self.logs.append(line)
        _tell(self._on_log, line)

    def finish(self, value: Any) -> None:
        """End with a value."""
        if not self.value.done():
            self.value.set_result(value)
            self._wake()

    def fail(self, error: Exception) -> None:
        """End with an error."""
        if not self.value.done():
            self.value.set_exception(error)
            self.value.exception()  # read once here: a caller that went away must not cause a warning
            self._wake()

    async def outcome(self) -> Any:
        """Return its value or raise its error, once both are known; who stops waiting leaves the call as it is.

        ``asyncio.shield`` does the same with one more round of the loop in every call.
        """
        if not self.value.done():
            end: asyncio.Future[None] = self.value.get_loop().create_future()
            self._waiting.append(end)
            await end
        return self.value.result()

    def _wake(self) -> None:
        """Wake who waits, after those who were to hear of the end first."""
        for end in self._waiting:
            if not end.done():
                end.set_result(None)


def _tell(callback: Callable[..., object] | None, *values: Any) -> None:
    """Call a listener; its failure is its own and must not reach the connection."""
    if callback is None:
        return
    try:
        callback(*values)
    except Exception:
        _logger.exception("a listener of a call failed")
