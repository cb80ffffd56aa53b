"""Approvals: what waits for a human, and the human's word."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from fastapi import APIRouter
from plm_engine_core.control_plane.vocabulary import TicketState

from plm_backend.dependencies import TheCaller, ThePlatform, TheWindow
from plm_backend.json_body import JsonRoute
from plm_backend.problems import BODIES, DOORS, documented
from plm_backend.schemas import DecisionBody, TicketDocument, TicketPage, ticket_document

router = APIRouter(prefix="/v1/approvals", tags=["approvals"], route_class=JsonRoute)


@router.get("", operation_id="listApprovals", response_model=TicketPage, responses=documented(*DOORS))
async def list_approvals(
    platform: ThePlatform, caller: TheCaller, window: TheWindow, state: TicketState | None = None
) -> Any:
    """Tickets of the tenant, oldest first."""
    tickets = await platform.control_plane.storage.approvals.list(
        caller.tenant_id, limit=window.wanted, after=window.after, state=state
    )
    return window.page(tickets, ticket_document)


@router.post(
    "/{ticket_id}/decision",
    operation_id="decideApproval",
    response_model=TicketDocument,
    responses=documented(*DOORS, *BODIES, 404, 409),
)
async def decide(ticket_id: UUID, body: DecisionBody, platform: ThePlatform, caller: TheCaller) -> Any:
    """Approve or deny. The decider is the caller; it needs `plm.hitl.resolve` and cannot be the requester."""
    ticket = await platform.control_plane.decide(
        caller.tenant_id, ticket_id, body.decision, approver=caller.principal, comment=body.comment
    )
    return ticket_document(ticket)
