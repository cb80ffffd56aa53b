"""How fast a tenant may propose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RateReading:
    """Whether a token was to be had, and when the next one will be."""

    allowed: bool
    retry_after_ms: int = 0
