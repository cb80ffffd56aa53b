"""When the windows of budgets begin and end: days, weeks from Monday and months, by the clock of some place."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import AfterValidator

from plm_engine_core.control_plane.vocabulary import Period

ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
"""When the window of a budget without a period began."""

_BESIDE = range(-1, 3)  # local midnights around a moment: a clock that is set back over midnight passes one twice


def _known(name: str) -> str:
    # A name without a slash may be an abbreviation to the database, such as CET, and then has no daylight-saving time.
    if name != "UTC" and not ("/" in name and name in _names()):
        raise ValueError("must be UTC or a time zone that is known here, as Area/City, such as Europe/Berlin")
    return name


@cache
def _names() -> frozenset[str]:
    return frozenset(available_timezones())


ZoneName = Annotated[str, AfterValidator(_known)]
"""A time zone by its IANA name, or UTC."""


def window_of(period: str, zone: str, at: datetime) -> tuple[datetime, datetime]:
    """When the window that `at` lies in began, and when it ends, both in UTC.

    A window begins at local midnight: at the first of two, and where that is left out at the moment at which the clock
    is set forward. Windows follow each other without gap or overlap whatever is done to the clock.

    Raises:
        ValueError: this machine knows no such zone.
    """
    try:
        place = UTC if zone == "UTC" else ZoneInfo(zone)  # UTC needs no data of zones, which a machine may not have
    except ZoneInfoNotFoundError as error:
        raise ValueError(f"no time zone {zone!r:.80} is known here") from error
    local = at.astimezone(place).replace(tzinfo=None)
    begins = [each.replace(tzinfo=place).astimezone(UTC) for each in _midnights(period, local)]
    return max(each for each in begins if each <= at), min(each for each in begins if each > at)


def end_of(period: str, starts_at: datetime, ends_at: datetime | None) -> datetime | None:
    """When a window ends: as it is recorded, else in UTC; None without a window."""
    if period == Period.TOTAL or ends_at is not None:
        return ends_at
    return window_of(period, "UTC", starts_at)[1]


def runs_at(at: datetime, period: str, starts_at: datetime, ends_at: datetime | None) -> bool:
    """Whether a window has begun and not ended; one without a period always has."""
    ends = end_of(period, starts_at, ends_at)
    return starts_at <= at and (ends is None or at < ends)


def _midnights(period: str, local: datetime) -> list[datetime]:
    day = local.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == Period.MONTH:
        months = [day.year * 12 + day.month - 1 + each for each in _BESIDE]
        return [day.replace(year=each // 12, month=each % 12 + 1, day=1) for each in months]
    first, length = (day - timedelta(days=day.weekday()), 7) if period == Period.WEEK else (day, 1)
    return [first + timedelta(days=length * each) for each in _BESIDE]
