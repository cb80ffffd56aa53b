"""How fast a tenant and each of its agents may propose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from plm_engine_core.control_plane.limits.subjects import Subjects


class Dimension(StrEnum):
    """Whose rate it is, from narrow to wide; buckets are locked in this order."""

    AGENT = "agent"  # the run's agent, or the run itself where it has none
    TENANT = "tenant"


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A token bucket: `per_second` tokens are added each second, up to `burst`; each proposal takes one."""

    dimension: Dimension
    per_second: float
    burst: float


@dataclass(frozen=True, kw_only=True)
class RateReading:
    """Whether every bucket had a token; else none was taken, and `retry_after_ms` says when all will have one.

    `dimension` names the bucket that takes longest.
    """

    allowed: bool
    retry_after_ms: int = 0
    dimension: Dimension | None = None


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What a decision went by without having asked: that every bucket has a token, and the time by the books' clock."""

    buckets: Sequence[Bucket]
    at: datetime


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the books say before a decision: `at` by their clock; `subjects` is None when there is no such run."""

    rate: RateReading
    at: datetime
    subjects: Subjects | None
