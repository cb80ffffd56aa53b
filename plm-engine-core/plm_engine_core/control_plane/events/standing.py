"""Where runs, tickets and budgets stand: what the tables say, in the words in which events tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from plm_engine_core.control_plane.vocabulary import RunState, TicketState

if TYPE_CHECKING:
    from plm_engine_core.control_plane.hitl.ticket import ApprovalTicket


@dataclass(frozen=True, kw_only=True)
class RunStanding:
    """What of a run changes, and which policy and trace it began under."""

    state: RunState
    policy_digest: str
    trace_id: str
    fencing_token: int = 0
    cancel_requested: bool = False
    reason: str | None = None
    message: str | None = None
    result: Any = None


@dataclass(frozen=True, kw_only=True)
class TicketStanding:
    """What a ticket is about, and what became of it."""

    run_id: UUID
    step_index: int
    attempt: int
    capability: str
    resource: str
    digest: str
    policy_digest: str
    state: TicketState = TicketState.PENDING
    decided_by: UUID | None = None
    comment: str | None = None
    consumed: bool = False
    escalated: bool = False
    supersedes: UUID | None = None
    superseded_by: UUID | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetKey:
    """Which budget: of whom, in which unit, and for which window."""

    scope: str
    scope_id: UUID
    unit: str
    period: str = "total"
    starts_at: datetime = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class BudgetStanding:
    """What was spent and what is set aside."""

    spent: Decimal = Decimal(0)
    reserved: Decimal = Decimal(0)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Runs, tickets and budgets of a tenant, as tables have them; `pruned` are streams whose beginning is gone."""

    runs: Mapping[UUID, RunStanding]
    tickets: Mapping[UUID, TicketStanding]
    budgets: Mapping[BudgetKey, BudgetStanding]
    pruned: frozenset[str] = frozenset()


def ticket_standing(ticket: ApprovalTicket) -> TicketStanding:
    """The same of a ticket as its table has it."""
    known: dict[str, Any] = {each.name: getattr(ticket, each.name, None) for each in fields(TicketStanding)}
    known |= {"consumed": ticket.consumed_at is not None, "escalated": ticket.escalated_at is not None}
    return TicketStanding(**{**known, "comment": ticket.comment or None})
