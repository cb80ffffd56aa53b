"""Humans for tests: they approve, deny or answer whatever waits, through the gate that real ones pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal
from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.hitl import ApprovalTicket
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.policy.approval import Demand
from plm_engine_core.control_plane.vocabulary import TicketDecision, TicketKind, TicketState

_MOST = 10_000  # tickets at once


async def approve_all(plane: ControlPlane, tenant_id: UUID, *, comment: str = "") -> Sequence[ApprovalTicket]:
    """Approve every pending call of a tenant, by as many people as its policy asks; the tickets as they are then.

    Separation of duties, deadlines and budgets hold as ever: these people are new, human, and hold what is demanded.
    """
    return [
        await _decide(plane, ticket, TicketDecision.APPROVE, comment)
        for ticket in await _pending(plane, tenant_id)
        if ticket.kind is TicketKind.APPROVAL
    ]


async def deny_all(plane: ControlPlane, tenant_id: UUID, *, comment: str = "") -> Sequence[ApprovalTicket]:
    """Deny every pending ticket of a tenant; the tickets as they are then."""
    return [await _decide(plane, ticket, TicketDecision.DENY, comment) for ticket in await _pending(plane, tenant_id)]


async def give_input(
    plane: ControlPlane, tenant_id: UUID, value: Any, *, comment: str = ""
) -> Sequence[ApprovalTicket]:
    """Give `value` to every pending ask of a tenant; the tickets as they are then.

    Raises:
        InvalidRequest: it is not what one of them asks for.
    """
    return [
        await plane.provide_input(
            tenant_id, ticket.id, value, approver=_human(plane.approvals.demand(ticket)), comment=comment
        )
        for ticket in await _pending(plane, tenant_id)
        if ticket.kind is TicketKind.INPUT
    ]


async def _pending(plane: ControlPlane, tenant_id: UUID) -> Sequence[ApprovalTicket]:
    """What still waits: a ticket whose deadline has passed counts as denied, whether that was written down or not."""
    now = await plane.storage.runs.now()
    pending = await plane.storage.approvals.list(tenant_id, limit=_MOST, after=None, state=TicketState.PENDING)
    return [ticket for ticket in pending if ticket.deadline > now]


async def _decide(
    plane: ControlPlane, ticket: ApprovalTicket, decision: TicketDecision, comment: str
) -> ApprovalTicket:
    demand = plane.approvals.demand(ticket)
    while ticket.state is TicketState.PENDING:
        ticket = await plane.decide(ticket.tenant_id, ticket.id, decision, approver=_human(demand), comment=comment)
    return ticket


def _human(demand: Demand) -> Principal:
    """Somebody new who holds what is demanded."""
    return Principal(user_id=new_id(), actor_kind="human", scopes=frozenset(demand.scopes))
