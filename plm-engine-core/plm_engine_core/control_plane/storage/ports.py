"""The ports: what the control plane asks of storage, in terms of intent.

Rules live in core code; a port stores, and makes every change conditional on the state it expects. One module although
it is long: whoever writes a storage needs all of it, and most of it is what the operations promise.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import UUID

from plm_shared.ledger import LedgerRecord

from plm_engine_core.control_plane.limits.budgets import Budget, BudgetKey, Reserve
from plm_engine_core.control_plane.limits.leases import ResourceLease
from plm_engine_core.control_plane.limits.locks import ResourceLock
from plm_engine_core.control_plane.limits.rate_limit import Assumed, Bucket, Prepared
from plm_engine_core.control_plane.vocabulary import (
    BudgetScope,
    Evidence,
    ExecutorKind,
    HaltScope,
    LockScope,
    OutcomeStatus,
    PolicyRole,
    RunKind,
    RunState,
    TicketDecision,
    TicketState,
)

if TYPE_CHECKING:
    from plm_engine_core.control_plane.activation import Activation, Roles
    from plm_engine_core.control_plane.admission.grants import Grant
    from plm_engine_core.control_plane.events import Checkpoint, Event, Head, StreamHead
    from plm_engine_core.control_plane.events.archive import Piece
    from plm_engine_core.control_plane.events.chain import Link
    from plm_engine_core.control_plane.events.feed import FeedCursor, FeedPage
    from plm_engine_core.control_plane.events.pruning import PrunedBatch
    from plm_engine_core.control_plane.events.standing import Standing
    from plm_engine_core.control_plane.halts import Halt, HaltDrill
    from plm_engine_core.control_plane.hitl.ticket import ApprovalScope, ApprovalTicket, Comment, ScopeTerms, Vote
    from plm_engine_core.control_plane.policy import PolicySnapshot
    from plm_engine_core.control_plane.policy.gates import GateRefusal
    from plm_engine_core.control_plane.policy.replay import Attempt
    from plm_engine_core.control_plane.policy.run_risk import GrantedAttempt
    from plm_engine_core.control_plane.runs.run import ArtifactRow, Heartbeat, Lease, NewRun, Orphan, Run, Step
    from plm_engine_core.control_plane.sweeping import ExpiredBatch

Connection = Any
"""A connection of the caller's, psycopg's synchronous or asynchronous, in a transaction; on it nothing is committed."""

CLOCK_TOLERANCE = timedelta(seconds=2)
"""How far the time that a decision assumed may be from that at which its booking arrives."""


class AdmitCommand(NamedTuple):
    """One decision, ready to be booked."""

    tenant_id: UUID
    run_id: UUID
    fencing_token: int
    command_id: str
    command_digest: str
    step_index: int
    attempt: int
    step_id: str
    step_key: str
    capability: str
    resource: str
    arguments: Mapping[str, Any]
    digest: str
    policy_digest: str
    executor_kind: ExecutorKind
    requester: UUID
    actor: str
    decision: Mapping[str, Any]
    ticket_id: UUID | None
    new_ticket_id: UUID
    ticket_seconds: float
    escalate_seconds: float | None
    grant_id: UUID
    grant_seconds: float
    span_id: str
    reserve: Sequence[Reserve]
    begin: bool = False
    lock: LockScope | None = None


class SettleCommand(NamedTuple):
    """One outcome, ready to be booked; `charges` maps units to decimal texts."""

    tenant_id: UUID
    run_id: UUID
    step_index: int
    attempt: int
    grant_id: UUID
    fencing_token: int
    status: OutcomeStatus
    outcome_digest: str
    evidence: Evidence
    output: Any
    error: Mapping[str, Any] | None
    usage: Mapping[str, str]
    charges: Mapping[str, str]
    artifacts: Sequence[Mapping[str, Any]]
    trace_id: str
    actor: str
    ledger: Sequence[LedgerRecord]


@dataclass(frozen=True, kw_only=True)
class VoteCommand:
    """One vote on a ticket, with what the ticket demands; `escalated` is how the voter's authority was checked.

    Where `as_read` is given, the vote only counts while that is the ticket's revision.
    """

    tenant_id: UUID
    ticket_id: UUID
    vote: TicketDecision
    voter: UUID
    actor: str
    comment: str
    quorum: int
    authority: Sequence[str]
    escalated: bool
    scope: ScopeTerms | None
    scope_id: UUID
    requester_may: bool = False
    as_read: str | None = None


@dataclass(frozen=True, kw_only=True)
class AskCommand:
    """An ask, ready to be booked: `decision` says whether it may be, `beyond` what is said once `most` were."""

    tenant_id: UUID
    run_id: UUID
    fencing_token: int
    step_index: int
    attempt: int
    step_id: str
    step_key: str
    resource: str
    arguments: Mapping[str, Any]
    digest: str
    policy_digest: str
    requester: UUID
    actor: str
    decision: Mapping[str, Any]
    beyond: Mapping[str, Any]
    most: int
    ticket_id: UUID
    ticket_seconds: float
    escalate_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class InputCommand:
    """An input that a human gives; `requester_may` is whether the policy lets the requester give it.

    `as_read` is that of a vote.
    """

    tenant_id: UUID
    ticket_id: UUID
    input: Any
    voter: UUID
    actor: str
    comment: str
    authority: Sequence[str]
    escalated: bool
    requester_may: bool
    as_read: str | None = None


class Delivery(Protocol):
    """Tells some run worker to drive a run; trusted to deliver at least once in the end, never once only."""

    async def enqueue(
        self, connection: Connection, tenant_id: UUID, run_id: UUID, *, after_seconds: float = 0.0
    ) -> None:
        """Enqueue in the transaction of `connection`, so that the job exists exactly when the change does.

        With `after_seconds` it is not due before. Of such jobs a run has one at most, or each double would go on for
        ever; the run is locked meanwhile.
        """
        ...


class AdmissionStore(Protocol):
    """The books of admission and settlement."""

    async def prepare(self, tenant_id: UUID, run_id: UUID, *, buckets: Sequence[Bucket]) -> Prepared:
        """Take one token of every bucket or of none, and read for whom the run works."""
        ...

    async def history(
        self, tenant_id: UUID, run_id: UUID, *, beside: tuple[int, int], limit: int
    ) -> tuple[Sequence[GrantedAttempt], int]:
        """The run's attempts beside this step and attempt that were granted and not given back unused.

        The newest `limit` of them by when they were proposed, oldest first, and how many are older: whoever makes a
        run's calls numbers its steps, in whichever order.
        """
        ...

    async def decided_on(
        self, tenant_id: UUID, run_id: UUID, step_index: int, attempt: int, *, connection: Connection | None = None
    ) -> Any:
        """The capability as the recorded decision of an attempt describes it; None where it describes none."""
        ...

    async def admit(self, command: AdmitCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book a decision; the answer has `status` granted, pending, steered or denied.

        It is `policy_changed`, and nothing is written, where another policy is active than the one that decided. With
        `begin`, what is granted is used up in the same transaction, and the answer has `begun`.
        """
        ...

    async def admit_as_assumed(self, command: AdmitCommand, assumed: Assumed) -> Mapping[str, Any]:
        """Book a decision that was made without `prepare`, in a transaction of its own; answers as `admit` does.

        A token of every bucket is taken with it. Where one has none, or the time that the decision went by is more than
        `CLOCK_TOLERANCE` off, the answer is `not_as_assumed`, and nothing is written.
        """
        ...

    async def begin(self, grant: Grant, *, fencing_token: int, actor: str) -> Mapping[str, Any]:
        """Use a grant up; the answer has `status` begun or refused."""
        ...

    async def settle(self, command: SettleCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book an outcome with its ledger rows."""
        ...

    async def expire(self, command: SettleCommand) -> bool:
        """Book that a call never started because its grant ran out, for whoever holds the run; says whether it was so.

        False, and nothing is written, where it began, was settled, has time left, or the run is not running. The
        fencing token of the command is not looked at.
        """
        ...


class RunStore(Protocol):
    """Runs, their steps and their leases."""

    async def create(self, new: NewRun) -> tuple[Run, bool]:
        """Create a run and enqueue its drive job in one commit; the flag says whether the key was replayed."""
        ...

    async def refuse(self, new: NewRun, refusal: GateRefusal) -> Run | None:
        """Record in the stream of the tenant that this run is not created; there is no other trace of it.

        Answers the run that the same request with its key created before, and then records nothing.

        Raises:
            IdempotencyConflict: the key was used for another request.
            NotFound: the tenant does not exist.
        """
        ...

    async def now(self) -> datetime:
        """The time by the clock of the books, which every decision goes by."""
        ...

    async def get(self, tenant_id: UUID, run_id: UUID) -> Run:
        """One run."""
        ...

    async def list(
        self, tenant_id: UUID, *, limit: int, before: tuple[datetime, UUID] | None, state: RunState | None
    ) -> Sequence[Run]:
        """Newest first, at most `limit`, strictly older than `before`."""
        ...

    async def steps(self, tenant_id: UUID, run_id: UUID, *, since: int = 0) -> Sequence[Step]:
        """Every attempt of every step from index `since` on, in order."""
        ...

    def attempts(self, tenant_id: UUID, *, since: datetime) -> AsyncIterator[Sequence[Attempt]]:
        """Every proposal of the tenant that was decided since then, a batch at a time, oldest run first; no asks."""
        ...

    async def budgets(self, tenant_id: UUID, run_id: UUID) -> Sequence[Budget]:
        """The budgets a call of this run draws on, from narrow to wide."""
        ...

    async def take(
        self, tenant_id: UUID, run_id: UUID, *, owner: str, seconds: float, kind: RunKind = RunKind.HOSTED
    ) -> Lease | None:
        """Take the lease of a run that is queued, or whose holder let it run out; None when there is none.

        Run workers take hosted runs; a run of kind `external` is for whoever made it, and never delivered.

        Raises:
            InvalidRequest: `seconds` is not more than 0 and at most a day.
        """
        ...

    async def renew(self, tenant_id: UUID, run_id: UUID, *, fencing_token: int, seconds: float) -> Heartbeat:
        """Renew a lease by the database's clock, and learn of cancels and halts.

        Raises:
            InvalidRequest: `seconds` is not more than 0 and at most a day.
        """
        ...

    async def finish(
        self,
        tenant_id: UUID,
        run_id: UUID,
        *,
        fencing_token: int,
        state: RunState,
        actor: str,
        reason: str | None = None,
        message: str | None = None,
        result: Any = None,
        again_after_seconds: float = 0.0,
    ) -> RunState:
        """Give the lease back with the run in `state` (queued, halted or terminal), and answer where it stands.

        A run that is to be parked as halted is queued again when no halt stands any more. A queued one is delivered
        again, and not before `again_after_seconds`.
        """
        ...

    async def request_cancel(self, tenant_id: UUID, run_id: UUID, *, actor: str) -> Run:
        """Cancel a parked run at once, or ask the worker of a running one."""
        ...

    async def reconcile(self, tenant_id: UUID, run_id: UUID, *, happened: bool, output: Any, actor: str) -> Run:
        """Say what became of the step whose outcome is unknown; the run continues in the same commit."""
        ...

    async def mark(self, command: MarkCommand) -> int:
        """Append a marker to the stream of a run that has not ended, once for each command id; answers its sequence."""
        ...

    async def abandoned(self, limit: int, *, patience_seconds: float) -> Sequence[tuple[UUID, UUID]]:
        """Tenant and id of runs, over all tenants, that nobody drives although somebody should.

        Their lease ran out, their drive job was lost (nobody took them for `patience_seconds`), their ticket expired,
        or the halt that parked them was lifted. Of runs of kind `external` only those that are parked for nothing.
        """
        ...

    async def orphaned(self, limit: int, *, forsaken_seconds: float) -> Sequence[Orphan]:
        """Runs of kind `external`, over all tenants, that their holder left.

        Their lease ran out; or they are queued, and something of them is open or nobody took them for
        `forsaken_seconds`.
        """
        ...

    async def expired(self, limit: int) -> Sequence[tuple[UUID, UUID]]:
        """Tenant and id of running runs, over all tenants, with a grant that ran out before its call began."""
        ...

    async def revive(self, tenant_id: UUID, run_id: UUID, *, patience_seconds: float) -> bool:
        """Enqueue a drive job for a run found by `abandoned`; false when somebody else has seen to it by now."""
        ...

    async def ahead(self, limit: int, *, patience_seconds: float) -> Sequence[tuple[UUID, UUID]]:
        """Tenant and id of queued and running runs, over all tenants, whose times a clock wrote that was ahead.

        They were changed later than in `patience_seconds` from now, or their lease goes on for longer than any may.
        """
        ...

    async def set_back(self, tenant_id: UUID, run_id: UUID, *, patience_seconds: float) -> bool:
        """Count the times of a run found by `ahead` from now on; false when somebody else has done so by now.

        Its lease goes on for as long as it was given, a day at most, so whoever holds it keeps it by renewing it.
        """
        ...

    async def mcrc(self, tenant_id: UUID, run_id: UUID) -> Mapping[str, Any]:
        """The run's row in `mcrc_v1_view`."""
        ...

    async def artifact(self, tenant_id: UUID, artifact_id: UUID) -> ArtifactRow:
        """One artifact's record."""
        ...

    async def unrecorded(self, tenant_id: UUID, artifact_ids: Sequence[UUID]) -> Sequence[UUID]:
        """Those of the ids that no artifact of the tenant has a record under, in any order; none for no such tenant."""
        ...


class ApprovalStore(Protocol):
    """Approval tickets, what was said about them, and the approval scopes that came of them."""

    async def get(self, tenant_id: UUID, ticket_id: UUID) -> ApprovalTicket:
        """One ticket."""
        ...

    async def list(
        self, tenant_id: UUID, *, limit: int, after: tuple[datetime, UUID] | None, state: TicketState | None
    ) -> Sequence[ApprovalTicket]:
        """Oldest first, at most `limit`, strictly younger than `after`."""
        ...

    async def votes(self, tenant_id: UUID, ticket_id: UUID) -> Sequence[Vote]:
        """The votes on a ticket, the first one first."""
        ...

    async def decide(self, command: VoteCommand) -> Mapping[str, Any]:
        """Count one vote; the answer has `status` decided, counted or refused."""
        ...

    async def ask(self, command: AskCommand) -> Mapping[str, Any]:
        """Book an ask, once; the answer has `status` pending, denied or policy_changed."""
        ...

    async def provide_input(self, command: InputCommand) -> Mapping[str, Any]:
        """Take an input, and end the ticket and its step with it; the answer has `status` decided or refused."""
        ...

    async def comments(self, tenant_id: UUID, ticket_id: UUID) -> Sequence[Comment]:
        """The comments on a ticket, the first one first."""
        ...

    async def comment(
        self, tenant_id: UUID, ticket_id: UUID, comment_id: UUID, *, body: str, author: UUID, actor: str
    ) -> Comment:
        """Add a comment."""
        ...

    async def scopes(
        self, tenant_id: UUID, *, limit: int, after: tuple[datetime, UUID] | None
    ) -> Sequence[ApprovalScope]:
        """The approval scopes of the tenant, whatever became of them; in the order of `list`."""
        ...

    async def revoke_scope(self, tenant_id: UUID, scope_id: UUID, *, by: UUID, actor: str) -> ApprovalScope:
        """End an approval scope; it then covers nothing more."""
        ...


@dataclass(frozen=True, kw_only=True)
class MarkCommand:
    """A marker, ready to be booked."""

    tenant_id: UUID
    run_id: UUID
    name: str
    details: Mapping[str, Any]
    command_id: str
    digest: str
    actor: str


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A counter-entry, ready to be booked: `amount` is added to what was spent."""

    key: BudgetKey
    amount: Decimal
    reason: str
    command_id: str
    digest: str


class BudgetStore(Protocol):
    """Budgets, as an operator sees and changes them; calls draw on them through admission."""

    async def list(
        self,
        tenant_id: UUID,
        *,
        limit: int,
        after: BudgetKey | None = None,
        scope: BudgetScope | None = None,
        scope_id: UUID | None = None,
    ) -> Sequence[Budget]:
        """Total budgets and present windows in the order of their places, at most `limit`, strictly behind `after`.

        Only those of a scope, or of one id.
        """
        ...

    async def set_limit(
        self, tenant_id: UUID, key: BudgetKey, limit: Decimal, *, time_zone: str | None = None, actor: str
    ) -> Budget:
        """Set and pin the limit of the present window, opening it where it is not there, in UTC or in `time_zone`.

        A window that runs is the present one, in whichever zone it was opened.

        Raises:
            InvalidRequest: a window has to be opened, and the storage does not know the zone.
        """
        ...

    async def correct(self, tenant_id: UUID, correction: Correction, *, actor: str) -> Budget:
        """Book a counter-entry once, unless it would leave less than nothing spent."""
        ...


class HaltStore(Protocol):
    """Halts."""

    async def trigger(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None,
        *,
        subject: str | None,
        reason: str,
        by: UUID,
        actor: str,
        cancel_seconds: float,
        registered: bool = False,
    ) -> Halt:
        """Commit a halt once nothing admitted before it is still uncommitted, or answer the one that stands.

        What it names must have run in the tenant, unless it is `registered`.
        """
        ...

    async def met(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None,
        *,
        subject: str | None,
        registered: bool = False,
    ) -> HaltDrill:
        """What a halt of this scope would meet in the tenant now; what it names is known as for `trigger`."""
        ...

    async def get(self, tenant_id: UUID, halt_id: UUID) -> Halt:
        """One halt of the tenant or of the system."""
        ...

    async def list(
        self, tenant_id: UUID, *, limit: int, before: tuple[datetime, UUID] | None, standing: bool
    ) -> Sequence[Halt]:
        """Halts of the tenant and of the system, newest first, strictly older than `before`; only those that stand."""
        ...

    async def lift(self, tenant_id: UUID, halt: Halt, *, by: UUID, actor: str) -> Halt:
        """Lift a halt and enqueue the runs it parked."""
        ...

    async def unfinished(self, limit: int) -> Sequence[UUID]:
        """Tenants, over all, in which a standing halt has not ended everything yet."""
        ...

    async def end_halted(self, tenant_id: UUID) -> int:
        """Revoke the unused grants under the tenant's standing halts, and note the calls in flight; safe to repeat.

        Answers how many rows could not be changed.
        """
        ...


class ResourceLeaseStore(Protocol):
    """Leases of named resources."""

    async def acquire(
        self, tenant_id: UUID, name: str, *, owner: str, seconds: float, actor: str
    ) -> ResourceLease | None:
        """Take the lease of a name that nobody holds; None where somebody does."""
        ...

    async def renew(self, lease: ResourceLease, *, seconds: float) -> ResourceLease:
        """Let a lease last from now on, while nobody took its name and it was not released.

        Raises:
            FencingLost: it is over.
        """
        ...

    async def release(self, lease: ResourceLease, *, actor: str) -> None:
        """End a lease; doing so again changes nothing.

        Raises:
            FencingLost: somebody took its name.
        """
        ...

    async def require(self, lease: ResourceLease, *, connection: Connection | None = None) -> None:
        """Refuse a holder that is none any more; on a caller's connection nobody can take the name before its end.

        Raises:
            FencingLost: it ran out, was released or taken.
        """
        ...

    async def list(self, tenant_id: UUID, *, limit: int) -> Sequence[ResourceLease]:
        """The leases that are held now, by name."""
        ...


class ResourceLockStore(Protocol):
    """Locks of resources, beside the admissions that take them."""

    async def list(self, tenant_id: UUID, *, limit: int) -> Sequence[ResourceLock]:
        """At most `limit` locks that are held now, the longest held first."""
        ...

    async def sweep(self, tenant_id: UUID, *, limit: int) -> int:
        """Remove at most `limit` records of locks whose call is over, and answer how many; it waits for nobody.

        They hold nobody up; this keeps them from growing with the resources that were ever touched.
        """
        ...


class EventStore(Protocol):
    """Event streams."""

    async def read(self, tenant_id: UUID, stream: str, *, after: int = 0, limit: int = 500) -> Sequence[Event]:
        """Events of one stream in order, from sequence `after` + 1."""
        ...

    async def feed(self, tenant_id: UUID, *, after: FeedCursor = ..., limit: int = 500) -> FeedPage:
        """Events of all streams after a cursor, none left out, as far as nothing can come before them any more.

        Raises:
            InvalidRequest: the cursor is of another database, or of another tenant's feed.
            FeedPruned: events after the cursor are gone; from `BEGINNING` on, what is left is shown.
            Conflict: the events are of another server, whose transactions had higher ids.
        """
        ...

    async def misplaced(self, tenant_id: UUID, *, stream: str | None = None, after: int = 0) -> Mapping[str, int]:
        """By stream, the first event whose place in the feed is before that of the one before it or beyond the head's.

        Events that checkpoint `after` covers are not looked at.
        """
        ...

    async def fold(self, tenant_id: UUID, apply: Callable[[Event], None]) -> Standing:
        """Hand every event to `apply`, in the order of its stream, and answer what the tables said at that instant.

        `apply` may be called in another thread.
        """
        ...

    async def heads(self, tenant_id: UUID) -> Sequence[StreamHead]:
        """Every stream of the tenant with its head."""
        ...


class CheckpointStore(Protocol):
    """Checkpoints over event streams, and the events they cover."""

    async def tenants(self) -> Sequence[UUID]:
        """Every tenant there is."""
        ...

    async def take(
        self,
        tenant_id: UUID,
        make: Callable[[Checkpoint | None, Sequence[Head], Sequence[Head], datetime], Checkpoint],
    ) -> Checkpoint | None:
        """Store what `make` makes of the newest checkpoint, all heads, those that changed, and the time.

        One process at a time does this for a tenant. None when nothing has changed since the newest checkpoint.
        """
        ...

    async def read(self, tenant_id: UUID, *, after: int = 0, limit: int = 100) -> Sequence[Checkpoint]:
        """Checkpoints in order, from number `after` + 1."""
        ...

    async def newest(self, tenant_id: UUID) -> Checkpoint | None:
        """The newest checkpoint, without its heads."""
        ...

    async def heads(self, tenant_id: UUID, *, number: int) -> Sequence[Head]:
        """Every head as the checkpoint `number` covers it."""
        ...

    async def archived(self, tenant_id: UUID) -> int:
        """The newest checkpoint that a recorded piece holds; 0 before the first."""
        ...

    async def record_piece(self, tenant_id: UUID, piece: Piece) -> None:
        """Record a stored piece of the archive; doing so again changes nothing."""
        ...

    async def pruned(self, tenant_id: UUID) -> int:
        """The newest checkpoint of which events were pruned; 0 where none were."""
        ...

    async def prune(self, tenant_id: UUID, *, actor: str, limit: int) -> PrunedBatch:
        """Prune at most `limit` events that are older than the tenant's retention and recorded as archived.

        It leaves stubs, and is told of as `events.pruning` says; ask again while there is more. One process at a time
        does this for a tenant.
        """
        ...

    def covered(self, tenant_id: UUID, number: int) -> Iterator[Link]:
        """The events that checkpoint `number` covers and the one before it does not, by stream and sequence.

        Like `links` it blocks while it reads: walk it in a thread.
        """
        ...

    def links(self, tenant_id: UUID, *, streams: Collection[str] | None = None, after: int = 0) -> Iterator[Link]:
        """Every event, of these streams or of all, that checkpoint `after` does not cover, by stream and sequence."""
        ...


class PolicyStore(Protocol):
    """Policies of the whole system, and which of them has which role."""

    async def standing(self) -> Roles:
        """The newest activation of each role."""
        ...

    async def content(self, digest: str) -> str:
        """The canonical text of a policy."""
        ...

    async def history(self, *, limit: int) -> Sequence[Activation]:
        """The newest activations, newest first."""
        ...

    async def activate(
        self,
        tenant_id: UUID,
        role: PolicyRole,
        policy: PolicySnapshot | None,
        *,
        previous: str | None,
        reason: str,
        by: UUID,
        actor: str,
    ) -> Activation | None:
        """Record that a policy has a role now, if `previous` still had it, with an event of the tenant; else None."""
        ...


class IdempotencyStore(Protocol):
    """Idempotency records, beside the commands that write them."""

    async def expire(self, tenant_id: UUID, *, keep_seconds: float, limit: int) -> ExpiredBatch:
        """Remove at most `limit` records of commands of runs that ended at least `keep_seconds` ago, a day or more.

        Records of other commands stay. It waits for nobody, and finds nothing where somebody else does the same for the
        tenant just now. Ask again while there is more.
        """
        ...


class Storage(Protocol):
    """All ports over one database."""

    @property
    def admission(self) -> AdmissionStore:
        """Admission and settlement."""
        ...

    @property
    def runs(self) -> RunStore:
        """Runs."""
        ...

    @property
    def approvals(self) -> ApprovalStore:
        """Tickets."""
        ...

    @property
    def budgets(self) -> BudgetStore:
        """Budgets."""
        ...

    @property
    def halts(self) -> HaltStore:
        """Halts."""
        ...

    @property
    def leases(self) -> ResourceLeaseStore:
        """Leases of named resources."""
        ...

    @property
    def locks(self) -> ResourceLockStore:
        """Locks of resources."""
        ...

    @property
    def events(self) -> EventStore:
        """Events."""
        ...

    @property
    def checkpoints(self) -> CheckpointStore:
        """Checkpoints over the event streams."""
        ...

    @property
    def policies(self) -> PolicyStore:
        """Policies and their activations."""
        ...

    @property
    def idempotency(self) -> IdempotencyStore:
        """Idempotency records."""
        ...
