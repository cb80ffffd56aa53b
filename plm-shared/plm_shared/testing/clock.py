"""Time that passes when the test says so."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

__all__ = ["FrozenClock"]


class FrozenClock:
    """Stands still until moved. ``clock()`` is the moment in UTC, ``clock.today()`` the day that prices are kept by."""

    def __init__(self, now: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        if now.tzinfo is None:
            raise ValueError(f"the clock needs an aware moment, not {now!r}; add tzinfo=UTC")
        self._now = now.astimezone(UTC)

    def __call__(self) -> datetime:
        """The moment."""
        return self._now

    def today(self) -> date:
        """The day in UTC."""
        return self._now.date()

    def advance(self, by: timedelta) -> None:
        """Move on; ``ValueError`` for a step back."""
        if by < timedelta(0):
            raise ValueError(f"time does not run backwards: {by}")
        self._now += by
