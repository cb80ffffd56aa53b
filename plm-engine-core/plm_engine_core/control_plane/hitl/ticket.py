"""An approval ticket: exactly what would be done, until when it may be decided, and what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.vocabulary import TicketState


@dataclass(frozen=True, kw_only=True)
class ApprovalTicket:
    """One request to a human; its approval authorises one call of this digest and policy, before the deadline."""

    id: UUID
    tenant_id: UUID
    run_id: UUID
    step_index: int
    attempt: int
    capability: str
    resource: str
    arguments: Mapping[str, Any]
    digest: str
    policy_digest: str
    tier: str
    risk: str
    requested_by: UUID
    state: TicketState
    deadline: datetime
    created_at: datetime
    decided_at: datetime | None = None
    decided_by: UUID | None = None
    comment: str | None = None
    consumed_at: datetime | None = None
