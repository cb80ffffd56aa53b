"""Locks of resources: which call holds what, for as long as it is not over."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from plm_engine_core.control_plane.vocabulary import LockHolder, LockScope


@dataclass(frozen=True, kw_only=True)
class ResourceLock:
    """The call that holds a resource, within its run or within the tenant, and since when by the clock of the books.

    It ends with the call: settled, revoked by a halt, or expired before it began. A call whose outcome is unknown holds
    it until somebody says what became of it.
    """

    tenant_id: UUID
    scope: LockScope
    resource: str
    held: LockHolder
    run_id: UUID
    step_index: int
    attempt: int
    grant_id: UUID
    taken_at: datetime
