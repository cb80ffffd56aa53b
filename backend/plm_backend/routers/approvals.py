"""Approvals: what waits for a human, and the human's word."""

from __future__ import annotations

import re
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.hitl import ScopeTerms, ticket_revision
from plm_engine_core.control_plane.vocabulary import TicketDecision, TicketState

from plm_backend.dependencies import TheCaller, ThePlatform, TheWindow
from plm_backend.json_body import JsonRoute
from plm_backend.problems import BODIES, DOORS, documented
from plm_backend.schemas import (
    ApprovalScopeDocument,
    ApprovalScopePage,
    CommentBody,
    CommentDocument,
    DecisionBody,
    TicketDetail,
    TicketDocument,
    TicketPage,
    approval_scope_document,
    comment_document,
    ticket_detail,
    ticket_document,
)

_ENTITY_TAG = re.compile(r'"([!#-~]*)"')

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


@router.get("/{ticket_id}", operation_id="getApproval", response_model=TicketDetail, responses=documented(*DOORS, 404))
async def get_approval(
    ticket_id: UUID,
    platform: ThePlatform,
    caller: TheCaller,
    response: Response,
    wait: Annotated[
        float, Query(ge=0, le=60, description="Answer when it is decided, at the latest after so long.")
    ] = 0,
) -> Any:
    """One ticket with its votes and comments. Waiting for it changes nothing of it.

    Its `ETag` is for the `If-Match` of who decides it.
    """
    plane, store = platform.control_plane, platform.control_plane.storage.approvals
    ticket = await plane.approvals.wait(caller.tenant_id, ticket_id, seconds=wait)
    votes = await store.votes(caller.tenant_id, ticket_id)
    comments = await store.comments(caller.tenant_id, ticket_id)
    response.headers["ETag"] = f'"{ticket_revision(ticket, votes, comments)}"'
    return ticket_detail(ticket, plane.approvals.demand(ticket), votes, comments)


@router.post(
    "/{ticket_id}/decision",
    operation_id="decideApproval",
    response_model=TicketDocument,
    responses=documented(*DOORS, *BODIES, 404, 409, 412),
)
async def decide(
    ticket_id: UUID,
    body: DecisionBody,
    platform: ThePlatform,
    caller: TheCaller,
    if_match: Annotated[
        str | None, Header(max_length=200, description="The `ETag` of the ticket that was looked at, or `*`.")
    ] = None,
) -> Any:
    """Approve, deny or provide an input. The decider is the caller, a human with the scopes that the ticket needs.

    Nobody approves what they asked for. A denial ends the ticket; so does the approval that completes its quorum, until
    when it stays pending. An ask ends with the first input that its schema takes. With `If-Match` nothing is decided
    when somebody has voted or said something since the ticket was read, or it was handed on.
    """
    plane, as_read = platform.control_plane, _tag(if_match)
    if not isinstance(body.decision, TicketDecision):
        return ticket_document(
            await plane.provide_input(
                caller.tenant_id,
                ticket_id,
                body.input,
                approver=caller.principal,
                comment=body.comment,
                as_read=as_read,
            )
        )
    offer = ScopeTerms(**body.scope.model_dump()) if body.scope is not None else None
    ticket = await plane.decide(
        caller.tenant_id,
        ticket_id,
        body.decision,
        approver=caller.principal,
        comment=body.comment,
        scope=offer,
        as_read=as_read,
    )
    return ticket_document(ticket)


@router.post(
    "/{ticket_id}/comments",
    status_code=201,
    operation_id="commentApproval",
    response_model=CommentDocument,
    responses=documented(*DOORS, *BODIES, 404),
)
async def comment(ticket_id: UUID, body: CommentBody, platform: ThePlatform, caller: TheCaller) -> Any:
    """Say something about a ticket: who may decide it, and who asked for it. It decides nothing and stays."""
    return comment_document(
        await platform.control_plane.approvals.comment(caller.tenant_id, ticket_id, body.body, author=caller.principal)
    )


def _tag(if_match: str | None) -> str | None:
    """The revision in an `If-Match` (RFC 9110, section 13.1.1); none where any will do."""
    if if_match is None or if_match == "*":
        return None
    tag = _ENTITY_TAG.fullmatch(if_match)
    if tag is None:
        raise InvalidRequest("If-Match takes one ETag, as it was answered, or *", field="If-Match")
    return tag[1]


scopes_router = APIRouter(prefix="/v1/approval-scopes", tags=["approvals"], route_class=JsonRoute)


@scopes_router.get(
    "", operation_id="listApprovalScopes", response_model=ApprovalScopePage, responses=documented(*DOORS)
)
async def list_scopes(platform: ThePlatform, caller: TheCaller, window: TheWindow) -> Any:
    """The standing approvals of the tenant, oldest first, also those that are over."""
    scopes = await platform.control_plane.storage.approvals.scopes(
        caller.tenant_id, limit=window.wanted, after=window.after
    )
    return window.page(scopes, approval_scope_document)


@scopes_router.delete(
    "/{scope_id}",
    operation_id="revokeApprovalScope",
    response_model=ApprovalScopeDocument,
    responses=documented(*DOORS, 404),
)
async def revoke_scope(scope_id: UUID, platform: ThePlatform, caller: TheCaller) -> Any:
    """End a standing approval before its time. Twice answers the same."""
    return approval_scope_document(
        await platform.control_plane.approvals.revoke_scope(caller.tenant_id, scope_id, by=caller.principal)
    )
