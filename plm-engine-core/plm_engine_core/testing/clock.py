"""Time that a test moves."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta


class FakeClock:
    """A clock for `MemoryStorage` that stands still until it is moved; any thread may read it.

    Raises:
        ValueError: `start` has no zone.
    """

    def __init__(self, start: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        if start.tzinfo is None:
            raise ValueError(f"{start} has no zone; give the clock one, such as UTC")
        self._lock = threading.Lock()
        self._now = start

    def __call__(self) -> datetime:
        """The time."""
        with self._lock:
            return self._now

    def move(self, seconds: float) -> datetime:
        """Move the clock, backwards too where `seconds` is negative, and answer the new time."""
        with self._lock:
            self._now += timedelta(seconds=seconds)
            return self._now
