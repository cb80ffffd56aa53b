"""Database rows as the control plane's own values."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from decimal import Decimal
from typing import Any

from plm_engine_core.control_plane.admission.proposal import Principal
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events.event import Event
from plm_engine_core.control_plane.events.standing import BudgetKey, BudgetStanding, RunStanding
from plm_engine_core.control_plane.halts import BY_ID, Halt, HaltCalls
from plm_engine_core.control_plane.hitl.ticket import ApprovalScope, ApprovalTicket, Comment, ScopeTerms, Vote
from plm_engine_core.control_plane.limits.budgets import Budget
from plm_engine_core.control_plane.limits.leases import ResourceLease
from plm_engine_core.control_plane.limits.locks import ResourceLock
from plm_engine_core.control_plane.limits.subjects import Subjects
from plm_engine_core.control_plane.limits.windows import end_of
from plm_engine_core.control_plane.runs.run import Run, Step
from plm_engine_core.control_plane.vocabulary import (
    BudgetScope,
    Evidence,
    HaltScope,
    LockHolder,
    LockScope,
    Period,
    RunKind,
    RunState,
    StepState,
    TicketDecision,
    TicketState,
)


def run_row(row: Mapping[str, Any]) -> Run:
    """One row of `run_states`."""
    return Run(
        tenant_id=row["tenant_id"],
        id=row["run_id"],
        kind=RunKind(row["kind"]),
        state=RunState(row["state"]),
        agent=row["agent"],
        input=row["input"],
        principal=Principal.from_json(row["principal"]),
        policy_digest=row["policy_digest"],
        trace_id=row["trace_id"],
        root_span_id=row["root_span_id"],
        fencing_token=row["fencing_token"],
        subjects=subjects_row(row),
        cancel_requested=row["cancel_requested_at"] is not None,
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        finished_at=row["finished_at"],
        reason=row["reason"],
        message=row["message"],
        result=row["result"],
    )


def subjects_row(row: Mapping[str, Any]) -> Subjects:
    """For whom the run of a row of `run_states` works."""
    return Subjects(
        agent_id=row["agent_id"], run_group_id=row["run_group_id"], user_id=row["user_id"], team=row["team"]
    )


def step_row(row: Mapping[str, Any]) -> Step:
    """One row of `run_steps`, joined with its grant."""
    return Step(
        step_index=row["step_index"],
        attempt=row["attempt"],
        step_id=row["step_id"],
        step_key=row["step_key"],
        capability=row["capability"],
        resource=row["resource"],
        arguments=row["arguments"],
        state=StepState(row["state"]),
        decision=row["decision"],
        grant_id=row["grant_id"],
        span_id=row["span_id"],
        grant_expires_at=row["grant_expires_at"],
        ticket_id=row["ticket_id"],
        evidence=Evidence(row["evidence"]) if row["evidence"] else None,
        output=row["output"],
        error=row["error"],
        usage=row["usage"] or {},
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
    )


def budget_row(row: Mapping[str, Any]) -> Budget:
    """One row of `budgets`."""
    return Budget(
        scope=BudgetScope(row["scope_kind"]),
        scope_id=row["scope_id"],
        unit=row["unit"],
        limit=Decimal(row["limit_amount"]),
        spent=Decimal(row["spent"]),
        reserved=Decimal(row["reserved"]),
        period=Period(row["period"]),
        subject=row["subject"],
        starts_at=row["starts_at"] if row["period"] != Period.TOTAL else None,
        ends_at=end_of(row["period"], row["starts_at"], row["ends_at"]),
        time_zone=(row["time_zone"] or "UTC") if row["period"] != Period.TOTAL else None,
        pinned=row["pinned"],
    )


def budget_told(row: Mapping[str, Any]) -> dict[str, str]:
    """How an event names a budget and its window."""
    return {
        "scope_kind": row["scope_kind"],
        "scope_id": str(row["scope_id"]),
        "unit": row["unit"],
        "period": row["period"],
        "starts_at": row["starts_at"].isoformat(),
        **{name: row[name] for name in ("subject", "time_zone") if row[name] is not None},
    }


def unknown_zone(time_zone: str | None) -> InvalidRequest:
    """What is said where no window can be opened."""
    return InvalidRequest(
        f"the storage knows no time zone {time_zone}: give it newer time zone data, or the policy another zone",
        field="time_zone",
    )


def resource_lease_row(row: Mapping[str, Any]) -> ResourceLease:
    """One row of `resource_leases`, of a lease that is not over."""
    return ResourceLease(**{name: value for name, value in row.items() if name != "taken_at"})


def resource_lock_row(row: Mapping[str, Any]) -> ResourceLock:
    """One row of `resource_locks`, of a call that is not over, with its resource and how it stands."""
    return ResourceLock(
        tenant_id=row["tenant_id"],
        scope=LockScope(row["scope"]),
        resource=row["resource"],
        held=LockHolder(row["held"]),
        run_id=row["run_id"],
        step_index=row["step_index"],
        attempt=row["attempt"],
        grant_id=row["grant_id"],
        taken_at=row["taken_at"],
    )


def lease_told(lease: ResourceLease) -> dict[str, Any]:
    """How an event names a lease."""
    return {"name": lease.name, "owner": lease.owner, "fencing_token": lease.fencing_token}


def ticket_row(row: Mapping[str, Any]) -> ApprovalTicket:
    """One row of `approval_tickets`."""
    return ApprovalTicket(**{**row, "state": TicketState(row["state"])})


def vote_row(row: Mapping[str, Any]) -> Vote:
    """One row of `approval_votes`."""
    offered = row["scope_uses"] is not None
    return Vote(
        ticket_id=row["ticket_id"],
        voter=row["voter"],
        vote=TicketDecision(row["vote"]),
        comment=row["comment"],
        authority=tuple(row["authority"]),
        voted_at=row["voted_at"],
        scope=ScopeTerms(uses=row["scope_uses"], seconds=row["scope_seconds"], any_resource=row["scope_any_resource"])
        if offered
        else None,
    )


def comment_row(row: Mapping[str, Any]) -> Comment:
    """One row of `approval_comments`."""
    return Comment(
        id=row["id"],
        ticket_id=row["ticket_id"],
        author=row["author"],
        body=row["body"],
        created_at=row["created_at"],
    )


def scope_row(row: Mapping[str, Any]) -> ApprovalScope:
    """One row of `approval_scopes`."""
    return ApprovalScope(**row)


def halt_row(row: Mapping[str, Any]) -> Halt:
    """One halt, of the tenant or of the system, with its calls in the tenant."""
    scope = HaltScope(row["scope"])
    calls = ("revoked", "in_flight", "open", "last_ended_at")
    return Halt(
        id=row["id"],
        scope=scope,
        scope_id=row["scope_id"] if scope in BY_ID else None,
        subject=row["subject"],
        epoch=row["epoch"],
        reason=row["reason"],
        triggered_by=row["triggered_by"],
        triggered_at=row["triggered_at"],
        lifted_by=row["lifted_by"],
        lifted_at=row["lifted_at"],
        cancel_seconds=row["cancel_seconds"],
        calls=HaltCalls(**{name: row[name] for name in calls}),
    )


def event_row(row: Mapping[str, Any]) -> Event:
    """One row of `events`."""
    return Event(**row)


def run_standing(row: Mapping[str, Any]) -> RunStanding:
    """One row of `run_states`, as far as events tell of it; whatever is wrong with the rest of it."""
    return RunStanding(
        state=RunState(row["state"]),
        policy_digest=row["policy_digest"],
        trace_id=row["trace_id"],
        fencing_token=row["fencing_token"],
        cancel_requested=row["cancel_requested_at"] is not None,
        reason=row["reason"],
        message=row["message"],
        result=row["result"],
    )


def budget_standing(row: Mapping[str, Any]) -> tuple[BudgetKey, BudgetStanding]:
    """One row of `budgets`, as far as events tell of it."""
    key = BudgetKey(
        scope=row["scope_kind"],
        scope_id=row["scope_id"],
        unit=row["unit"],
        period=row["period"],
        starts_at=row["starts_at"].astimezone(UTC),
    )
    return key, BudgetStanding(spent=Decimal(row["spent"]), reserved=Decimal(row["reserved"]))
