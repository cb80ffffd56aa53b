"""Projections: where runs, tickets and budgets stand, folded from events alone.

The tables are what everybody reads; the events are the authority on them. Rebuilding shows that the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from plm_engine_core.control_plane.events.event import TENANT_STREAM, Event
from plm_engine_core.control_plane.events.standing import (
    BudgetKey,
    BudgetStanding,
    RunStanding,
    Standing,
    TicketStanding,
)
from plm_engine_core.control_plane.vocabulary import EventKind, RunState, TicketKind, TicketState

if TYPE_CHECKING:
    from plm_engine_core.control_plane.storage.ports import Storage

_RUN = "run/"
_LONGEST_ERROR = 300
_MOST_UNREADABLE = 1_000

CHANGES_NOTHING = frozenset(
    {
        EventKind.RUN_REFUSED,
        EventKind.STEP_STEERED,
        EventKind.STEP_STARTED,
        EventKind.ESCALATION_RAISED,
        EventKind.APPROVAL_VOTED,
        EventKind.APPROVAL_COMMENTED,
        EventKind.APPROVAL_SCOPE_REVOKED,
        EventKind.HALT_TRIGGERED,
        EventKind.HALT_LIFTED,
        EventKind.POLICY_ACTIVATED,
        EventKind.BUDGET_SET,
        EventKind.SHADOW_CHANGED,
        EventKind.EVENTS_PRUNED,
        EventKind.LEASE_TAKEN,
        EventKind.LEASE_RELEASED,
        EventKind.MARKER,
    }
)
"""Kinds of event that change neither a run nor a ticket nor a budget."""


@dataclass(kw_only=True)
class Projections:
    """The fold. Events of one stream come in order; streams may come in any.

    `unreadable` says by event why it is none that this release could have written, of the first thousand.
    """

    runs: dict[UUID, RunStanding] = field(default_factory=dict)
    tickets: dict[UUID, TicketStanding] = field(default_factory=dict)
    budgets: dict[BudgetKey, BudgetStanding] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    _reserved: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._folds: Mapping[str, Callable[[UUID, Mapping[str, Any], str], None]] = {
            EventKind.RUN_CREATED: self._created,
            EventKind.RUN_TAKEN: self._taken,
            EventKind.RUN_PARKED: self._given_back,
            EventKind.RUN_RESUMED: self._given_back,
            EventKind.RUN_SUCCEEDED: self._ended,
            EventKind.RUN_FAILED: self._ended,
            EventKind.RUN_CANCELLED: self._ended,
            EventKind.RUN_CANCEL_REQUESTED: self._cancel_requested,
            EventKind.STEP_GRANTED: self._granted,
            EventKind.STEP_DENIED: self._denied,
            EventKind.STEP_SETTLED: self._settled,
            EventKind.STEP_RECONCILED: self._queued,
            EventKind.APPROVAL_REQUESTED: self._asked,
            EventKind.APPROVAL_DECIDED: self._decided,
            EventKind.APPROVAL_EXPIRED: self._expired,
            EventKind.APPROVAL_ESCALATED: self._escalated,
        }

    @property
    def folded_kinds(self) -> frozenset[str]:
        """Kinds of event that change a run, a ticket or a budget."""
        return frozenset({*self._folds, EventKind.BUDGET_CORRECTED})

    def apply(self, event: Event) -> None:
        """Go one event further. One of a run whose beginning is not known, or that cannot be read, is left out."""
        try:
            self._apply(event)
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            words = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
            if len(self.unreadable) < _MOST_UNREADABLE:
                self.unreadable[f"event {event.seq} of {event.stream}"] = f"it cannot be read: {words}"
            else:
                self.unreadable["further events"] = f"some cannot be read either; the first {_MOST_UNREADABLE} are told"

    def _apply(self, event: Event) -> None:
        if event.kind == EventKind.BUDGET_CORRECTED:
            self._book(event.data, spent=Decimal(event.data["amount"]))
        if not event.stream.startswith(_RUN):
            return
        run_id = UUID(event.stream.removeprefix(_RUN))
        fold = self._folds.get(event.kind)
        if fold is not None and (run_id in self.runs or event.kind == EventKind.RUN_CREATED):
            fold(run_id, event.data, event.actor)

    def _created(self, run_id: UUID, data: Mapping[str, Any], _: str) -> None:
        self.runs[run_id] = RunStanding(
            state=RunState.QUEUED, policy_digest=data["policy_digest"], trace_id=data["trace_id"]
        )

    def _taken(self, run_id: UUID, data: Mapping[str, Any], _: str) -> None:
        self._run(run_id, RunState.RUNNING, fencing_token=data["fencing_token"])

    def _given_back(self, run_id: UUID, data: Mapping[str, Any], _: str) -> None:
        """Its holder gave the lease back, and then the event names the state; else a parked run was queued again."""
        told = {name: data.get(name) for name in ("reason", "message", "result")} if "state" in data else {}
        self._run(run_id, RunState(data.get("state", RunState.QUEUED)), **told)

    def _ended(self, run_id: UUID, data: Mapping[str, Any], actor: str) -> None:
        if "was" in data:  # it was parked, so nobody held it
            token = self.runs[run_id].fencing_token + 1
            ended = {"reason": "cancelled", "message": "cancelled on request", "cancel_requested": True}
            self._run(run_id, RunState.CANCELLED, fencing_token=token, **ended)
        else:
            self._given_back(run_id, data, actor)
        self._tickets_of(run_id, TicketState.CANCELLED)

    def _cancel_requested(self, run_id: UUID, _: Mapping[str, Any], __: str) -> None:
        self.runs[run_id] = replace(self.runs[run_id], cancel_requested=True)

    def _granted(self, _: UUID, data: Mapping[str, Any], __: str) -> None:
        self._reserved[data["answer"]["grant_id"]] = data["reserved"]
        for each in data["reserved"]:
            self._book(each, reserved=Decimal(each["amount"]))
        ticket = data["answer"].get("ticket_id")
        if ticket is not None:
            self._ticket(ticket, consumed=True)

    def _denied(self, run_id: UUID, data: Mapping[str, Any], _: str) -> None:
        if data["answer"].get("reason") == "approval_expired":
            self._tickets_of(run_id, TicketState.EXPIRED)

    def _settled(self, run_id: UUID, data: Mapping[str, Any], _: str) -> None:
        for each in self._reserved.pop(data["grant_id"]):
            self._book(each, reserved=-Decimal(each["amount"]), spent=Decimal(data["spent"][each["unit"]]))
        if data["status"] == "outcome_unknown":
            message = data.get("error", {}).get("message")
            self._run(run_id, RunState.OUTCOME_UNKNOWN, reason="outcome_unknown", message=message)

    def _queued(self, run_id: UUID, _: Mapping[str, Any], __: str) -> None:
        self._run(run_id, RunState.QUEUED)

    def _asked(self, run_id: UUID, data: Mapping[str, Any], _: str) -> None:
        answer = data["answer"]
        reason = answer["reason"] if data.get("ticket_kind") == TicketKind.INPUT else "approval_required"
        self._run(run_id, RunState.AWAITING_APPROVAL, reason=reason, message=answer.get("message"))
        ticket_id = UUID(answer["ticket_id"])
        if ticket_id in self.tickets:
            return
        supersedes = UUID(answer["supersedes"]) if "supersedes" in answer else None
        self.tickets[ticket_id] = TicketStanding(
            run_id=run_id,
            step_index=data["step"],
            attempt=data["attempt"],
            capability=data["capability"],
            resource=data["resource"],
            digest=data["digest"],
            policy_digest=data["policy_digest"],
            supersedes=supersedes,
        )
        if supersedes is not None:
            open_still = self.tickets[supersedes].state is TicketState.PENDING
            closed = {"state": TicketState.CANCELLED} if open_still else {}
            self._ticket(answer["supersedes"], superseded_by=ticket_id, **closed)

    def _decided(self, run_id: UUID, data: Mapping[str, Any], actor: str) -> None:
        by = UUID(actor.partition(":")[2])
        self._ticket(data["ticket_id"], state=TicketState(data["decision"]), decided_by=by, comment=data.get("comment"))
        self._woken(run_id)

    def _expired(self, run_id: UUID, data: Mapping[str, Any], _: str) -> None:
        self._ticket(data["ticket_id"], state=TicketState.EXPIRED)
        self._woken(run_id)

    def _escalated(self, _: UUID, data: Mapping[str, Any], __: str) -> None:
        self._ticket(data["ticket_id"], escalated=True)

    def _woken(self, run_id: UUID) -> None:
        if self.runs[run_id].state is RunState.AWAITING_APPROVAL:
            self._run(run_id, RunState.QUEUED)

    def _run(self, run_id: UUID, state: RunState, **changes: Any) -> None:
        """Every move sets or clears reason and message; other things stay."""
        self.runs[run_id] = replace(self.runs[run_id], **{"reason": None, "message": None, **changes, "state": state})

    def _ticket(self, ticket_id: str, **changes: Any) -> None:
        self.tickets[UUID(ticket_id)] = replace(self.tickets[UUID(ticket_id)], **changes)

    def _tickets_of(self, run_id: UUID, state: TicketState) -> None:
        for ticket_id, ticket in self.tickets.items():
            if ticket.run_id == run_id and ticket.state is TicketState.PENDING:
                self.tickets[ticket_id] = replace(ticket, state=state)

    def _book(self, entry: Mapping[str, Any], *, reserved: Decimal = Decimal(0), spent: Decimal = Decimal(0)) -> None:
        window = {"period": entry["period"]} if "period" in entry else {}
        if "starts_at" in entry:
            window["starts_at"] = datetime.fromisoformat(entry["starts_at"]).astimezone(UTC)
        key = BudgetKey(scope=entry["scope_kind"], scope_id=UUID(entry["scope_id"]), unit=entry["unit"], **window)
        before = self.budgets.get(key, BudgetStanding())
        self.budgets[key] = BudgetStanding(spent=before.spent + spent, reserved=before.reserved + reserved)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where events and tables disagree."""

    what: str
    events: Any
    table: Any


def differences(folded: Projections, table: Standing) -> list[Difference]:
    """Where the two disagree.

    What belongs to a pruned stream is left out, and then every budget that is not of one run as well: its sum is no
    longer in the events. Where the tenant's own stream was pruned, what was spent is left out of every budget:
    corrections of it stood there.
    """
    gone = {UUID(stream.removeprefix(_RUN)) for stream in table.pruned if stream.startswith(_RUN)}
    runs = {run_id: run for run_id, run in table.runs.items() if run_id not in gone}
    tickets = {ticket_id: ticket for ticket_id, ticket in table.tickets.items() if ticket.run_id not in gone}
    corrected = TENANT_STREAM in table.pruned
    return [
        *(Difference(what=event, events=problem, table=None) for event, problem in folded.unreadable.items()),
        *_compared("run", folded.runs, runs),
        *_compared("ticket", folded.tickets, tickets),
        *_compared(
            "budget",
            _sums(folded.budgets, gone, corrected=corrected),
            _sums(table.budgets, gone, corrected=corrected),
        ),
    ]


def _sums(
    budgets: Mapping[BudgetKey, BudgetStanding], gone: set[UUID], *, corrected: bool
) -> dict[BudgetKey, BudgetStanding]:
    def told(key: BudgetKey) -> bool:
        return (key.scope == "run" and key.scope_id not in gone) or not gone

    known = {key: replace(each, spent=Decimal(0)) if corrected else each for key, each in budgets.items()}
    return {key: budget for key, budget in known.items() if told(key) and budget != BudgetStanding()}


def _compared(what: str, folded: Mapping[Any, Any], table: Mapping[Any, Any]) -> list[Difference]:
    return [
        Difference(what=f"{what} {key}", events=folded.get(key), table=table.get(key))
        for key in sorted({*folded, *table}, key=str)
        if folded.get(key) != table.get(key)
    ]


async def rebuild(storage: Storage, tenant_id: UUID) -> tuple[Projections, list[Difference]]:
    """Fold all events of a tenant, and compare with what the tables said at that very instant."""
    folded = Projections()
    table = await storage.events.fold(tenant_id, folded.apply)
    return folded, differences(folded, table)
