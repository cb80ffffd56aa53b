"""The one gate through which humans decide."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal, check_principal
from plm_engine_core.control_plane.errors import Conflict, Forbidden, InvalidRequest
from plm_engine_core.control_plane.hitl.inputs import check_input
from plm_engine_core.control_plane.hitl.ticket import ApprovalScope, ApprovalTicket, Comment, ScopeTerms
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.policy import Demand, PolicySnapshot
from plm_engine_core.control_plane.storage.ports import ApprovalStore, InputCommand, VoteCommand
from plm_engine_core.control_plane.texts import check_storable, word_of
from plm_engine_core.control_plane.vocabulary import ActionTier, RiskLevel, TicketDecision, TicketKind, TicketState

MAX_COMMENT = 10_000
MAX_WAIT_SECONDS = 3600.0

_LOOK_EVERY_SECONDS = 0.5


class ApprovalGate:
    """Counts votes on tickets, and takes inputs: of authorised people, before the deadline; one decision counts.

    Nobody approves a call that they asked for. An input allows nothing, so who a run works for may give one to it,
    unless the policy has somebody else do it.
    """

    def __init__(self, *, store: ApprovalStore, policy: PolicySnapshot) -> None:
        self._store = store
        self._policy = policy

    def demand(self, ticket: ApprovalTicket) -> Demand:
        """What a ticket needs under the policy in force."""
        escalated = ticket.escalated_at is not None
        if ticket.kind is TicketKind.INPUT:
            return self._policy.approval.input_demand(escalated=escalated)
        return self._policy.approval.demand(ActionTier(ticket.tier), RiskLevel(ticket.risk), escalated=escalated)

    async def decide(
        self,
        tenant_id: UUID,
        ticket_id: UUID,
        decision: TicketDecision,
        *,
        approver: Principal,
        comment: str = "",
        scope: ScopeTerms | None = None,
        as_read: str | None = None,
    ) -> ApprovalTicket:
        """Approve or deny one ticket: a denial ends it, and so does the approval that completes the quorum.

        The parked run continues in the same commit. The approver's OAuth scopes are held against the ticket's tier and
        risk under the policy in force, and so is every approval before: one that was given with less, as before the
        ticket was handed on, counts once it is given again. Otherwise the same vote by the same person again answers
        the same. `scope` offers an approval scope: it comes to be when every approver of the ticket offered one, on the
        narrowest of their terms. With `as_read`, the revision of the ticket that was looked at (`ticket_revision`), it
        is refused where somebody has voted or said something since, or the ticket was handed on.

        Raises:
            Forbidden: the approver lacks an OAuth scope, is not a human, or asked for the call
            (`separation_of_duties`); or the policy allows no such approval scope (`scope_not_allowed`).
            Conflict: `already_decided`, `already_voted` the other way, `approval_expired`, or `escalated` meanwhile;
            it is not `as_read` any more (`changed_meanwhile`); or it asks for an input, which is given or denied
            (`ticket_kind`).
            InvalidRequest: the comment is too long, or the terms of the scope are no positive numbers.
            NotFound: no such ticket in this tenant.
        """
        check_principal(approver, field="approver")
        require_human(approver)
        decision = word_of(TicketDecision, decision, field="decision")
        _check_comment(comment)
        _check_revision(as_read)
        ticket = await self._store.get(tenant_id, ticket_id)
        if ticket.kind is TicketKind.INPUT and decision is TicketDecision.APPROVE:
            raise _other_kind("the ticket asks for an input: give it with provide_input, or deny it")
        demand = self.demand(ticket)
        _require_scopes(approver, demand.scopes)
        if scope is not None:
            self._check_terms(ticket, decision, scope)
        answer = await self._store.decide(
            VoteCommand(
                tenant_id=tenant_id,
                ticket_id=ticket_id,
                vote=decision,
                voter=approver.user_id,
                actor=approver.actor,
                comment=comment,
                quorum=demand.quorum,
                authority=demand.scopes,
                escalated=ticket.escalated_at is not None,
                scope=scope,
                scope_id=new_id(),
                requester_may=self._requester_may(ticket),
                as_read=as_read,
            )
        )
        _raise_refused(answer)
        return await self._store.get(tenant_id, ticket_id)

    async def provide_input(
        self,
        tenant_id: UUID,
        ticket_id: UUID,
        value: Any,
        *,
        approver: Principal,
        comment: str = "",
        as_read: str | None = None,
    ) -> ApprovalTicket:
        """Give the input that a ticket asks for: a JSON value that its schema takes. The first valid decision counts.

        It becomes the output of the step that asked, recorded with who gave it, and the parked run continues in the
        same commit. It allows, spends and reserves nothing. The same input by the same person again answers the same.
        Do not give secrets: the record keeps an input for good, and no message repeats one. `as_read` is that of
        `decide`.

        Raises:
            InvalidRequest: the value is no JSON, too large, or breaks the schema; names the path, never the value.
            Forbidden: the approver lacks an OAuth scope or is not a human; asked for the run, where the policy has
            somebody else answer (`separation_of_duties`); or the policy lets no agent ask any more
            (`input_not_allowed`).
            Conflict: `already_decided`, `already_voted` against it, `approval_expired`, or `escalated` meanwhile; it
            is not `as_read` any more (`changed_meanwhile`); or it asks for an approval (`ticket_kind`).
            NotFound: no such ticket in this tenant.
        """
        check_principal(approver, field="approver")
        require_human(approver)
        _check_comment(comment)
        _check_revision(as_read)
        ticket = await self._store.get(tenant_id, ticket_id)
        if ticket.kind is not TicketKind.INPUT:
            raise _other_kind("the ticket asks for an approval: approve or deny it")
        if self._policy.approval.input is None:
            problem = "the policy in force lets no agent ask humans for an input; deny the ticket"
            raise Forbidden(problem, reason="input_not_allowed")
        demand = self.demand(ticket)
        _require_scopes(approver, demand.scopes)
        await asyncio.to_thread(check_input, value, ticket.arguments)  # a schema may make it take a while
        answer = await self._store.provide_input(
            InputCommand(
                tenant_id=tenant_id,
                ticket_id=ticket_id,
                input=value,
                voter=approver.user_id,
                actor=approver.actor,
                comment=comment,
                authority=demand.scopes,
                escalated=ticket.escalated_at is not None,
                requester_may=self._requester_may(ticket),
                as_read=as_read,
            )
        )
        _raise_refused(answer)
        return await self._store.get(tenant_id, ticket_id)

    def _requester_may(self, ticket: ApprovalTicket) -> bool:
        rule = self._policy.approval.input
        return ticket.kind is TicketKind.INPUT and rule is not None and rule.by_requester

    def _check_terms(self, ticket: ApprovalTicket, decision: TicketDecision, terms: ScopeTerms) -> None:
        """Refuse an approval scope wider than the policy allows; what it allows none of is refused, never narrowed."""
        if decision is not TicketDecision.APPROVE:
            raise InvalidRequest("an approval scope goes with an approval", field="scope")
        if type(terms.uses) is not int or terms.uses < 1:
            raise InvalidRequest(f"an approval scope is for 1 use or more, not {terms.uses!r:.80}", field="scope.uses")
        if type(terms.seconds) not in (int, float) or not 0 < terms.seconds < float("inf"):
            problem = f"an approval scope is for more than 0 seconds, not {terms.seconds!r:.80}"
            raise InvalidRequest(problem, field="scope.seconds")
        widest = self._policy.approval.standing
        if widest is None:
            problem = "the policy allows no approval scopes"
        elif RiskLevel(ticket.risk).rank > widest.max_risk.rank:
            problem = f"the policy allows approval scopes up to {widest.max_risk.value} risk, this is {ticket.risk}"
        elif terms.uses > widest.max_uses or terms.seconds > widest.max_seconds:
            problem = (
                f"the policy allows at most {widest.max_uses} uses in {widest.max_seconds:g} s, "
                f"not {terms.uses} in {terms.seconds:g} s"
            )
        elif terms.any_resource and not widest.any_resource:
            problem = "the policy allows approval scopes for the ticket's own resource only"
        else:
            return
        raise Forbidden(problem, reason="scope_not_allowed")

    async def comment(self, tenant_id: UUID, ticket_id: UUID, body: str, *, author: Principal) -> Comment:
        """Add a comment to a ticket; who may decide it may comment, and so may who asked for the call.

        Raises:
            Forbidden: the author may do neither. InvalidRequest: the comment is empty or too long.
            NotFound: no such ticket in this tenant.
        """
        check_principal(author, field="author")
        if isinstance(body, str) and not body.strip():
            raise InvalidRequest("a comment needs some text", field="body")
        _check_comment(body, field="body")
        ticket = await self._store.get(tenant_id, ticket_id)
        if author.user_id != ticket.requested_by:
            _require_scopes(author, self.demand(ticket).scopes)
        return await self._store.comment(
            tenant_id, ticket_id, new_id(), body=body, author=author.user_id, actor=author.actor
        )

    async def wait(self, tenant_id: UUID, ticket_id: UUID, *, seconds: float) -> ApprovalTicket:
        """The ticket once it is decided, or as it stands when `seconds` are over: a waiter never changes a ticket.

        Raises:
            InvalidRequest: `seconds` is not between 0 and an hour. NotFound: no such ticket in this tenant.
        """
        if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_WAIT_SECONDS:
            problem = f"the time to wait must be from 0 to {MAX_WAIT_SECONDS:g} s, not {seconds}"
            raise InvalidRequest(problem, field="seconds")
        until = time.monotonic() + seconds
        while True:
            ticket = await self._store.get(tenant_id, ticket_id)
            left = until - time.monotonic()
            if ticket.state is not TicketState.PENDING or left <= 0:
                return ticket
            await asyncio.sleep(min(left, _LOOK_EVERY_SECONDS))

    async def revoke_scope(self, tenant_id: UUID, scope_id: UUID, *, by: Principal) -> ApprovalScope:
        """End an approval scope before its time; twice answers the same.

        Raises:
            Forbidden: the caller lacks the OAuth scope of approvers. NotFound: no such approval scope in this tenant.
        """
        check_principal(by, field="by")
        require_human(by)
        _require_scopes(by, (self._policy.approval.required_scope,))
        return await self._store.revoke_scope(tenant_id, scope_id, by=by.user_id, actor=by.actor)


def require_human(principal: Principal) -> None:
    """Refuse whoever is no human.

    Raises:
        Forbidden: `not_human`.
    """
    if principal.actor_kind != "human":
        raise Forbidden("only a human may decide an approval", reason="not_human")


def _other_kind(problem: str) -> Conflict:
    return Conflict(problem, reason="ticket_kind")


def _check_revision(as_read: object) -> None:
    if as_read is not None and not isinstance(as_read, str):
        raise InvalidRequest(f"the revision of a ticket is a text, not {as_read!r:.80}", field="as_read")
    check_storable(as_read or "", field="as_read")


def _raise_refused(answer: Mapping[str, Any]) -> None:
    if answer["status"] == "refused":
        kind = Forbidden if answer["reason"] == "separation_of_duties" else Conflict
        raise kind(answer["message"], reason=answer["reason"])


def _require_scopes(principal: Principal, required: tuple[str, ...]) -> None:
    missing = tuple(scope for scope in required if scope not in principal.scopes)
    if missing:
        raise Forbidden(
            f"deciding this approval needs the OAuth scope {' and '.join(missing)}",
            reason="missing_scopes",
            missing_scopes=missing,
        )


def _check_comment(comment: str, field: str = "comment") -> None:
    if not isinstance(comment, str):
        raise InvalidRequest(f"the comment must be a text, not {comment!r:.80}", field=field)
    if len(comment) > MAX_COMMENT:
        raise InvalidRequest(f"the comment has {len(comment)} characters, at most {MAX_COMMENT}", field=field)
    check_storable(comment, field=field)
