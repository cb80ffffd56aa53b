"""A ticket: exactly what is asked of humans, until when it may be decided, and what was said about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from plm_engine_core.control_plane.vocabulary import PROVIDE_INPUT, TicketDecision, TicketKind, TicketState


@dataclass(frozen=True, kw_only=True)
class ApprovalTicket:
    """One request to humans; its approval authorises one call of this digest and policy, before the deadline.

    `escalate_seconds` is set where the policy hands it on, once, when nobody decided in time. `supersedes` is the
    ticket of the same step whose call was proposed before, with other arguments.

    Where an agent asks for an input, `arguments` are its `question` and the `schema` of the answer, words of the agent;
    `capability` is the word `provide_input`, and `input` what a human gave, once the ticket is approved.
    """

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
    escalate_seconds: float | None = None
    escalated_at: datetime | None = None
    supersedes: UUID | None = None
    superseded_by: UUID | None = None
    input: Any = None

    @property
    def kind(self) -> TicketKind:
        """Whether it asks for an approval or for an input."""
        return TicketKind.INPUT if self.capability == PROVIDE_INPUT else TicketKind.APPROVAL


@dataclass(frozen=True, kw_only=True)
class ScopeTerms:
    """The approval scope that an approver offers with an approval: so many further calls, for so long.

    It covers the ticket's own resource, or any where `any_resource` says so.
    """

    uses: int
    seconds: float
    any_resource: bool = False


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One person's word on a ticket; `authority` are the OAuth scopes that were asked of it when it was given."""

    ticket_id: UUID
    voter: UUID
    vote: TicketDecision
    comment: str
    authority: tuple[str, ...]
    voted_at: datetime
    scope: ScopeTerms | None = None


@dataclass(frozen=True, kw_only=True)
class Comment:
    """One remark on a ticket; it decides nothing and is never changed."""

    id: UUID
    ticket_id: UUID
    author: UUID
    body: str
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class ApprovalScope:
    """A standing approval: calls of one capability by one agent for one requester, under one policy, so many times.

    `resource` is None where any is covered. It never covers another tier or a higher risk than those of the ticket it
    came from, nor the capability under a definition by which a call would mean something else, and it ends with its
    time, its uses, its revocation or the policy.
    """

    id: UUID
    tenant_id: UUID
    ticket_id: UUID
    capability: str
    resource: str | None
    agent: str
    requested_by: UUID
    policy_digest: str
    tier: str
    risk: str
    max_uses: int
    used: int
    expires_at: datetime
    granted_by: UUID
    created_at: datetime
    revoked_at: datetime | None = None
    revoked_by: UUID | None = None


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def ticket_revision(ticket: ApprovalTicket, votes: Sequence[Vote], comments: Sequence[Comment]) -> str:
    """Names what somebody read of a ticket: another one whenever its state, votes or comments are others.

    Who decides may name it (`as_read`), and is refused when the ticket is another by then.
    """
    times = [vote.voted_at for vote in votes]
    return revision(ticket.state.value, ticket.escalated_at, times, comments=len(comments))


def revision(state: str, escalated_at: datetime | None, voted_at: Iterable[datetime], *, comments: int) -> str:
    """The same of a ticket's parts, as storages have them."""
    times = sorted(voted_at)
    newest = (times[-1] - _EPOCH) // timedelta(microseconds=1) if times else 0
    return f"{state}-{int(escalated_at is not None)}-{len(times)}-{newest}-{comments}"
