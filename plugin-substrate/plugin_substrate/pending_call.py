"""A call from the moment it has a slot until its end: what it reports, and what it ends with."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from plugin_substrate.headers import Spent
from plugin_substrate.interface import CallContext
from plugin_substrate.log_pipe import LOG_TAIL_LINES
from plugin_substrate.outcome import Outcome

_logger = logging.getLogger(__name__)


class PendingCall(Outcome[Any]):
    """A call in a worker, as the host sees it: the outcome is that of the call. Belongs to one event loop."""

    def __init__(
        self,
        context: CallContext,
        *,
        on_progress: Callable[[float, str], object] | None = None,
        on_usage: Callable[[dict[str, float]], object] | None = None,
        on_log: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        self.usage: dict[str, float] = {}
        self.logs: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self.forced = False
        self.answered = False
        self.sent_at: float | None = None
        self.spent = Spent()
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


def _tell(callback: Callable[..., object] | None, *values: Any) -> None:
    """Call a listener; its failure is its own and must not reach the connection."""
    if callback is None:
        return
    try:
        callback(*values)
    except Exception:
        _logger.exception("a listener of a call failed")
