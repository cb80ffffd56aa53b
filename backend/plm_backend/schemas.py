"""The documents of the API, version 1.

One module although it is long: it is the whole contract with clients, and is read and reviewed as one page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, Self
from uuid import UUID

from plm_engine_core.control_plane import Principal
from plm_engine_core.control_plane.activation import Activation
from plm_engine_core.control_plane.agents import StandingAgent
from plm_engine_core.control_plane.amounts import Amount
from plm_engine_core.control_plane.events import Event, Verification
from plm_engine_core.control_plane.halts import Halt
from plm_engine_core.control_plane.hitl import ApprovalScope, ApprovalTicket, Comment, Vote
from plm_engine_core.control_plane.limits import Budget, BudgetKey, Unit
from plm_engine_core.control_plane.policy import Demand
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.runs import Run, Step
from plm_engine_core.control_plane.vocabulary import (
    PROVIDE_INPUT,
    ActionTier,
    AgentStatus,
    AutonomyLevel,
    BudgetScope,
    HaltScope,
    Period,
    PolicyRole,
    RunState,
    TicketDecision,
    TicketKind,
    TicketState,
)
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from plm_backend.storable import StorableObject, StorableText

_MOST_BROKEN = 200

MIME_TYPE = r"^[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*(;[ -~]*)?$"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileInput(_Body):
    """A file given with the request: its text, or its bytes in base64. `name` is a bare file name, never a path."""

    name: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(default="application/octet-stream", max_length=255, pattern=MIME_TYPE)
    text: str | None = None
    base64: str | None = None

    @field_validator("name")
    @classmethod
    def _bare(cls, name: str) -> str:
        if name in {".", ".."} or not name.isprintable() or "/" in name or "\\" in name:
            raise ValueError("must be a bare file name, without separators and control characters")
        return name


class RunCreate(_Body):
    """What to run: an agent by name, its inputs, and the most it may spend."""

    agent: StorableText = Field(min_length=1, max_length=120)
    inputs: StorableObject = Field(default_factory=dict)
    files: dict[StorableText, FileInput] = Field(default_factory=dict, max_length=100)
    budget: dict[Unit, Amount] = Field(default_factory=dict)
    run_group_id: UUID | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """What makes two requests the same; what is not said is left out, as it was before it could be."""
        unsaid = {"run_group_id"} if self.run_group_id is None else set()
        return self.model_dump(mode="json", exclude=unsaid)


class ScopeOffer(_Body):
    """The approval scope that an approver offers with an approval: so many further calls, for so long."""

    uses: int = Field(ge=1, le=10_000)
    seconds: float = Field(gt=0, le=30 * 86400, allow_inf_nan=False)
    any_resource: bool = False


class DecisionBody(_Body):
    """An approver's word. Without `scope` it is about this exact call only.

    An ask is answered with `provide_input` and `input`, any JSON value that its schema takes, or denied.
    """

    decision: TicketDecision | Literal["provide_input"]
    comment: StorableText = Field(default="", max_length=10_000)
    scope: ScopeOffer | None = None
    input: Any = None

    @model_validator(mode="after")
    def _input_goes_with_providing_it(self) -> Self:
        if (self.decision == PROVIDE_INPUT) != ("input" in self.model_fields_set):
            raise ValueError("`input` goes with the decision `provide_input`, and with no other")
        if self.decision == PROVIDE_INPUT and self.scope is not None:
            raise ValueError("`scope` goes with the decision `approve`: an input allows nothing")
        return self


class CommentBody(_Body):
    """A remark on a ticket."""

    body: StorableText = Field(min_length=1, max_length=10_000)


class HaltCreate(_Body):
    """What to stop, and why: `scope_id` is the run or run group, `subject` the name of the agent or capability."""

    scope: HaltScope
    scope_id: UUID | None = None
    subject: StorableText | None = Field(default=None, min_length=1, max_length=200)
    reason: StorableText = Field(min_length=1, max_length=2000)


class BudgetName(_Body):
    """Which budget: `subject` is the name of an agent, team or model, or the id of anything else; `per` its window."""

    scope: BudgetScope
    subject: StorableText = Field(min_length=1, max_length=200)
    unit: Unit
    per: Period = Period.TOTAL

    @property
    def key(self) -> BudgetKey:
        """What the books call it.

        Raises:
            InvalidRequest: the subject is no id, where it has to be one.
        """
        return BudgetKey.of(self.scope, self.subject, self.unit, self.per)


class BudgetSet(BudgetName):
    """The limit that a budget is to have, in this window and all later ones."""

    limit: Amount


class BudgetCorrection(BudgetName):
    """A counter-entry: `amount` is added to what was spent, less than 0 gives back."""

    amount: Decimal
    reason: StorableText = Field(min_length=1, max_length=2000)


class AgentStatusSet(_Body):
    """What an agent may do in the tenant from now on: nothing, or what it is registered for."""

    status: Literal[AgentStatus.ACTIVE, AgentStatus.SUSPENDED]
    reason: StorableText = Field(default="", max_length=2000)


class ActivationCreate(_Body):
    """A policy with the role it is to have; without a policy the shadow ends."""

    role: PolicyRole = PolicyRole.ACTIVE
    policy: StorableObject | None = None
    previous: str | None = Field(max_length=64)
    reason: StorableText = Field(min_length=1, max_length=2000)


class PolicyName(BaseModel):
    """A policy by its content, and as its author calls it."""

    digest: str
    version: str


class PolicyDocument(BaseModel):
    """What decides. `activated` is null until a policy was activated; each process then decides by its file."""

    deciding: PolicyName
    file: PolicyName
    activated: str | None
    shadow: str | None


class ActivationDocument(BaseModel):
    """One activation; `digest` is null where a shadow ended."""

    number: int
    role: PolicyRole
    digest: str | None
    version: str | None
    previous: str | None
    reason: str
    activated_by: UUID
    activated_at: datetime


class Links(BaseModel):
    """Where to go from here."""

    self: str
    events: str
    cancel: str
    mcrc: str


class RunDocument(BaseModel):
    """One run."""

    contract_version: Literal["1.0.0"] = "1.0.0"
    run_id: UUID
    trace_id: str
    state: RunState
    agent: dict[str, Any]
    run_group_id: UUID | None
    reason: str | None
    message: str | None
    result: Any
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    links: Links


class StepDocument(BaseModel):
    """One attempt of one step."""

    step: int
    attempt: int
    step_id: str
    capability: str
    resource: str
    state: str
    evidence: str | None
    ticket_id: UUID | None
    error: dict[str, Any] | None
    usage: dict[str, Any]
    output: Any
    started_at: datetime | None
    finished_at: datetime | None


class BudgetDocument(BaseModel):
    """One budget; amounts are decimal texts. `pinned`: an operator set its limit.

    `starts_at`, `ends_at` and `time_zone` are of its present window, and null without one.
    """

    scope: str
    scope_id: UUID
    unit: str
    period: str
    subject: str | None
    starts_at: datetime | None
    ends_at: datetime | None
    time_zone: str | None
    limit: str
    spent: str
    reserved: str
    pinned: bool


class BudgetPage(BaseModel):
    """Total budgets and present windows, from narrow to wide; `next` is the cursor of the following page."""

    items: list[BudgetDocument]
    next: str | None


class AgentDocument(BaseModel):
    """One registered version of an agent with its ceilings; `status` is how it stands in the tenant."""

    id: str
    version: str
    owner: str
    status: AgentStatus
    registered_status: AgentStatus
    autonomy: AutonomyLevel
    tiers: list[ActionTier]
    budget: dict[str, str]
    capabilities: list[str] | None
    delegations: int
    halt_id: UUID | None


class AgentList(BaseModel):
    """Registered agents; where `registered` is false, any agent may do what the policy allows."""

    registered: bool
    items: list[AgentDocument]


class CapabilityList(BaseModel):
    """Every registered version of every capability that the caller's tenant may use."""

    items: list[CapabilityDescriptor]


class PrincipalDocument(BaseModel):
    """On whose behalf a run acts; `delegated_by` are those who had this one ask, the first of them first."""

    user_id: UUID
    actor_kind: str
    scopes: list[str]
    delegated_by: list[UUID]
    expires_at: datetime | None
    delegations_left: int | None


class WhyDocument(BaseModel):
    """Why something stands where it stands; `because` leads on to what decided it. Absent members say nothing."""

    kind: str
    id: str
    state: str
    message: str = ""
    reason: str | None = None
    stage: str | None = None
    rule: str | None = None
    limit: dict[str, str] = Field(default_factory=dict)
    lock: dict[str, str | int] = Field(default_factory=dict)
    policy_digest: str | None = None
    unblocked_by: str = ""
    because: WhyDocument | None = None


class RunDetail(RunDocument):
    """One run with whom it acts for, its steps and its budgets."""

    principal: PrincipalDocument
    steps: list[StepDocument]
    budgets: list[BudgetDocument]


class RunPage(BaseModel):
    """Runs, newest first; `next` is the cursor of the following page."""

    items: list[RunDocument]
    next: str | None


class TicketDocument(BaseModel):
    """One ticket: exactly what would be done, or is asked for, and until when it may be decided.

    Of the kind `input`, `arguments` are the `question` and the `schema` of the answer, words of the agent; `input` is
    what was given, once the state is `approved`.
    """

    ticket_id: UUID
    kind: TicketKind
    run_id: UUID
    step: int
    capability: str
    resource: str
    arguments: dict[str, Any]
    digest: str
    policy_digest: str
    tier: str
    risk: str
    requested_by: UUID
    state: TicketState
    deadline: datetime
    created_at: datetime
    decided_at: datetime | None
    decided_by: UUID | None
    comment: str | None
    escalated_at: datetime | None
    supersedes: UUID | None
    superseded_by: UUID | None
    input: Any


class VoteDocument(BaseModel):
    """One person's word on a ticket; `authority` are the OAuth scopes that it was held against."""

    voter: UUID
    vote: TicketDecision
    comment: str
    authority: list[str]
    scope: ScopeOffer | None
    voted_at: datetime


class CommentDocument(BaseModel):
    """One remark on a ticket."""

    comment_id: UUID
    author: UUID
    body: str
    created_at: datetime


class DemandDocument(BaseModel):
    """What the ticket needs under the policy in force: so many approvals by people who each hold all of `scopes`."""

    scopes: list[str]
    quorum: int


class TicketDetail(TicketDocument):
    """One ticket with what it needs and what was said about it."""

    needs: DemandDocument
    votes: list[VoteDocument]
    comments: list[CommentDocument]


class ApprovalScopeDocument(BaseModel):
    """A standing approval; `resource` is null where any is covered."""

    scope_id: UUID
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
    revoked_at: datetime | None
    revoked_by: UUID | None


class ApprovalScopePage(BaseModel):
    """Approval scopes, oldest first."""

    items: list[ApprovalScopeDocument]
    next: str | None


class TicketPage(BaseModel):
    """Tickets, oldest first."""

    items: list[TicketDocument]
    next: str | None


class HaltCallsDocument(BaseModel):
    """What a halt met in the tenant: grants it revoked, and calls in flight; `open` ones are not seen to end yet."""

    revoked: int
    in_flight: int
    open: int
    last_ended_at: datetime | None


class HaltDocument(BaseModel):
    """One halt. Calls in flight are to have ended `cancel_seconds` after `triggered_at`."""

    halt_id: UUID
    scope: HaltScope
    scope_id: UUID | None
    subject: str | None
    epoch: int
    reason: str
    triggered_by: UUID
    triggered_at: datetime
    lifted_by: UUID | None
    lifted_at: datetime | None
    cancel_seconds: float | None
    calls: HaltCallsDocument


class HaltPage(BaseModel):
    """Halts, newest first."""

    items: list[HaltDocument]
    next: str | None


class EventDocument(BaseModel):
    """One event, as its stream has it; `hash` and `prev_hash` are hexadecimal."""

    stream: str
    seq: int
    kind: str
    actor: str
    occurred_at: datetime
    prev_hash: str
    hash: str
    payload: dict[str, Any]


class HeldBackDocument(BaseModel):
    """Events that are committed but not shown yet: how many (at most 1000 are counted), and when the oldest was."""

    events: int
    since: datetime


class EventPage(BaseModel):
    """Events of all streams; `next` is the cursor to go on with, now or later."""

    items: list[EventDocument]
    next: str
    held_back: HeldBackDocument | None


class BrokenStreamDocument(BaseModel):
    """A stream that does not verify: how many of its events do, and the first that does not."""

    stream: str
    events: int
    first_bad_seq: int
    problem: str


class VerificationDocument(BaseModel):
    """What the hash chains say of themselves; of `broken_streams`, at most 200 are named in `broken`."""

    consistent: bool
    streams: int
    events: int
    broken_streams: int
    broken: list[BrokenStreamDocument]


class Health(BaseModel):
    """Whether the process lives, or can serve."""

    status: str
    checks: dict[str, str] = Field(default_factory=dict)


def verification_document(streams: Sequence[Verification]) -> dict[str, Any]:
    """The public form of a verification."""
    broken = [each for each in streams if not each.consistent]
    return {
        "consistent": not broken,
        "streams": len(streams),
        "events": sum(each.events for each in streams),
        "broken_streams": len(broken),
        "broken": [asdict(each) for each in broken[:_MOST_BROKEN]],
    }


def run_document(run: Run) -> dict[str, Any]:
    """The public form of a run."""
    base = f"/v1/runs/{run.id}"
    return {
        "run_id": run.id,
        "trace_id": run.trace_id,
        "state": run.state,
        "agent": {key: value for key, value in run.agent.items() if key != "plan"},
        "run_group_id": run.subjects.run_group_id,
        "reason": run.reason,
        "message": run.message,
        "result": run.result,
        "created_at": run.created_at,
        "updated_at": run.updated_at,
        "finished_at": run.finished_at,
        "links": Links(self=base, events=f"{base}/events", cancel=f"{base}/cancel", mcrc=f"{base}/mcrc"),
    }


def step_document(step: Step) -> StepDocument:
    """The public form of a step."""
    return StepDocument(
        step=step.step_index,
        attempt=step.attempt,
        step_id=step.step_id,
        capability=step.capability,
        resource=step.resource,
        state=step.state.value,
        evidence=step.evidence.value if step.evidence else None,
        ticket_id=step.ticket_id,
        error=dict(step.error) if step.error is not None else None,
        usage=dict(step.usage),
        output=step.output,
        started_at=step.started_at,
        finished_at=step.finished_at,
    )


def principal_document(principal: Principal) -> PrincipalDocument:
    """The public form of a principal."""
    return PrincipalDocument(**{**asdict(principal), "scopes": sorted(principal.scopes)})


def agent_document(each: StandingAgent) -> AgentDocument:
    """The public form of a registered agent."""
    registered = each.descriptor.model_dump(mode="json")
    return AgentDocument(
        **{
            **registered,
            "status": each.status,
            "registered_status": each.descriptor.status,
            "tiers": sorted(registered["tiers"]),
            "capabilities": None if registered["capabilities"] is None else sorted(registered["capabilities"]),
            "halt_id": each.halt.id if each.halt is not None else None,
        }
    )


def budget_document(budget: Budget) -> BudgetDocument:
    """The public form of a budget."""

    def text(amount: Decimal) -> str:
        return f"{amount.normalize():f}"

    return BudgetDocument(
        scope_id=budget.scope_id,
        scope=budget.scope.value,
        unit=budget.unit,
        period=budget.period.value,
        subject=budget.subject,
        starts_at=budget.starts_at,
        ends_at=budget.ends_at,
        time_zone=budget.time_zone,
        limit=text(budget.limit),
        spent=text(budget.spent),
        reserved=text(budget.reserved),
        pinned=budget.pinned,
    )


def ticket_document(ticket: ApprovalTicket) -> TicketDocument:
    """The public form of a ticket."""
    return TicketDocument(
        ticket_id=ticket.id,
        kind=ticket.kind,
        run_id=ticket.run_id,
        step=ticket.step_index,
        capability=ticket.capability,
        resource=ticket.resource,
        arguments=dict(ticket.arguments),
        digest=ticket.digest,
        policy_digest=ticket.policy_digest,
        tier=ticket.tier,
        risk=ticket.risk,
        requested_by=ticket.requested_by,
        state=ticket.state,
        deadline=ticket.deadline,
        created_at=ticket.created_at,
        decided_at=ticket.decided_at,
        decided_by=ticket.decided_by,
        comment=ticket.comment,
        escalated_at=ticket.escalated_at,
        supersedes=ticket.supersedes,
        superseded_by=ticket.superseded_by,
        input=ticket.input,
    )


def ticket_detail(
    ticket: ApprovalTicket, demand: Demand, votes: Sequence[Vote], comments: Sequence[Comment]
) -> TicketDetail:
    """The public form of a ticket with everything around it."""
    return TicketDetail(
        **ticket_document(ticket).model_dump(),
        needs=DemandDocument(scopes=list(demand.scopes), quorum=demand.quorum),
        votes=[
            VoteDocument(
                voter=vote.voter,
                vote=vote.vote,
                comment=vote.comment,
                authority=list(vote.authority),
                scope=ScopeOffer(**asdict(vote.scope)) if vote.scope is not None else None,
                voted_at=vote.voted_at,
            )
            for vote in votes
        ],
        comments=[comment_document(comment) for comment in comments],
    )


def comment_document(comment: Comment) -> CommentDocument:
    """The public form of a comment."""
    return CommentDocument(
        comment_id=comment.id, author=comment.author, body=comment.body, created_at=comment.created_at
    )


def approval_scope_document(scope: ApprovalScope) -> ApprovalScopeDocument:
    """The public form of an approval scope."""
    return ApprovalScopeDocument(
        scope_id=scope.id, **{key: value for key, value in asdict(scope).items() if key not in ("id", "tenant_id")}
    )


def halt_document(halt: Halt) -> HaltDocument:
    """The public form of a halt."""
    return HaltDocument(
        halt_id=halt.id,
        scope=halt.scope,
        scope_id=halt.scope_id,
        subject=halt.subject,
        epoch=halt.epoch,
        reason=halt.reason,
        triggered_by=halt.triggered_by,
        triggered_at=halt.triggered_at,
        lifted_by=halt.lifted_by,
        lifted_at=halt.lifted_at,
        cancel_seconds=halt.cancel_seconds,
        calls=HaltCallsDocument(**asdict(halt.calls)),
    )


def activation_document(made: Activation) -> ActivationDocument:
    """The public form of an activation."""
    return ActivationDocument(**vars(made))


def event_document(event: Event) -> dict[str, Any]:
    """The public form of an event."""
    return {
        "stream": event.stream,
        "seq": event.seq,
        "kind": event.kind,
        "actor": event.actor,
        "occurred_at": event.occurred_at,
        "prev_hash": event.prev_hash.hex(),
        "hash": event.hash.hex(),
        "payload": event.shown,
    }


def jsonable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A database row as JSON values; decimals as texts, so that no digit is lost."""
    return {
        key: str(value)
        if isinstance(value, Decimal | UUID)
        else value.isoformat()
        if isinstance(value, datetime)
        else value
        for key, value in row.items()
    }
