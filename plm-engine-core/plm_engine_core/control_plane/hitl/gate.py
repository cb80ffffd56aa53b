"""The one gate through which humans decide."""

from __future__ import annotations

from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal
from plm_engine_core.control_plane.errors import Conflict, Forbidden, InvalidRequest
from plm_engine_core.control_plane.hitl.ticket import ApprovalTicket
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.storage.ports import ApprovalStore
from plm_engine_core.control_plane.vocabulary import TicketDecision, TicketState

MAX_COMMENT = 10_000


class ApprovalGate:
    """Decides tickets: once each, before their deadline, by an authorised somebody who is not the requester."""

    def __init__(self, *, store: ApprovalStore, policy: PolicySnapshot) -> None:
        self._store = store
        self._policy = policy

    async def decide(
        self, tenant_id: UUID, ticket_id: UUID, decision: TicketDecision, *, approver: Principal, comment: str = ""
    ) -> ApprovalTicket:
        """Approve or deny one ticket; the parked run continues in the same commit.

        The same decision by the same person again answers the same.

        Raises:
            Forbidden: the approver lacks the OAuth scope, is not a human, or asked for the call
            (`separation_of_duties`). Conflict: `already_decided` or `approval_expired`.
            NotFound: no such ticket in this tenant.
        """
        required = self._policy.approval.required_scope
        if approver.actor_kind != "human":
            raise Forbidden("only a human may decide an approval", reason="not_human")
        if required not in approver.scopes:
            raise Forbidden(
                f"deciding approvals needs the OAuth scope {required}",
                reason="missing_scopes",
                missing_scopes=(required,),
            )
        if len(comment) > MAX_COMMENT:
            raise InvalidRequest(f"the comment has {len(comment)} characters, at most {MAX_COMMENT}", field="comment")
        state = TicketState.APPROVED if decision is TicketDecision.APPROVE else TicketState.DENIED
        answer = await self._store.decide(
            tenant_id, ticket_id, state, decided_by=approver.user_id, comment=comment, actor=approver.actor
        )
        if answer["status"] == "refused":
            if answer["reason"] == "separation_of_duties":
                raise Forbidden(answer["message"], reason=answer["reason"])
            raise Conflict(answer["message"], reason=answer["reason"])
        return await self._store.get(tenant_id, ticket_id)
