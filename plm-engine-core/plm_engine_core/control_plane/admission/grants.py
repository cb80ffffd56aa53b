"""Grants: the right to make one call, once, before it expires and while no halt stands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from plm_engine_core.control_plane.vocabulary import Reason


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What admission hands out and settlement takes back."""

    id: UUID
    tenant_id: UUID
    run_id: UUID
    step_index: int
    attempt: int
    step_key: str
    fencing_token: int
    span_id: str
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The answer to `begin`: the call may leave the host only when `accepted`.

    Else `rule` is the book that refused, and `unblock` what would let the call go on.
    """

    accepted: bool
    reason: Reason | None = None
    message: str = ""
    rule: str = ""
    unblock: str = ""
