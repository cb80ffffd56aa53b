"""Runs and their steps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import Conflict, IdempotencyConflict, InvalidRequest, NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM, run_stream
from plm_engine_core.control_plane.limits.budgets import Budget
from plm_engine_core.control_plane.limits.windows import ALWAYS
from plm_engine_core.control_plane.policy.gates import GateRefusal
from plm_engine_core.control_plane.policy.replay import Attempt
from plm_engine_core.control_plane.runs.run import ArtifactRow, NewRun, Run, Step
from plm_engine_core.control_plane.runs.states import sources_of
from plm_engine_core.control_plane.storage.commands import creation_json, refusal_json
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.budgets import open_budget, runs, spent
from plm_engine_core.control_plane.storage.memory.leases import MemoryLeases, close_books
from plm_engine_core.control_plane.storage.memory.settlement import already_exists, write_artifact
from plm_engine_core.control_plane.storage.memory.values import fresh, kept_json, storable_text
from plm_engine_core.control_plane.storage.ports import MarkCommand
from plm_engine_core.control_plane.storage.rows import budget_row, run_row, step_row
from plm_engine_core.control_plane.vocabulary import (
    PROVIDE_INPUT,
    BudgetScope,
    EventKind,
    RunKind,
    RunState,
    StepState,
)

_CREATE_OPERATION = "runs.create"
_MARK_OPERATION = "runs.mark"
_OWN = {
    "run": "run_id",
    "run_group": "run_group_id",
    "agent": "agent_id",
    "user": "user_id",
    "team": "team",
    "tenant": "tenant_id",
}
_ACTOR_KINDS = ("human", "agent", "system")


class MemoryRuns(MemoryLeases):
    """Runs in memory."""

    async def create(self, new: NewRun) -> tuple[Run, bool]:
        """Create a run, its budgets, its input artifacts and its drive job in one transaction."""
        async with self._books.turn() as books:
            earlier = _claim_key(books, new) if new.idempotency_key is not None else None
            if earlier is not None:
                return _read(books.run(new.tenant_id, earlier)), True
            _insert(books, new)
            actor, told = new.principal.actor, creation_json(new)
            books.append(new.tenant_id, run_stream(new.run_id), EventKind.RUN_CREATED, actor, told)
            if new.kind is RunKind.HOSTED:
                books.deliver(new.tenant_id, new.run_id)
            return _read(books.run(new.tenant_id, new.run_id)), False

    async def refuse(self, new: NewRun, refusal: GateRefusal) -> Run | None:
        """Record that a run is not created, unless its key made one before."""
        async with self._books.turn() as books:
            earlier = _run_of_key(books, new) if new.idempotency_key is not None else None
            if earlier is not None:
                return _read(books.run(new.tenant_id, earlier))
            told = refusal_json(new, refusal)
            books.append(new.tenant_id, TENANT_STREAM, EventKind.RUN_REFUSED, new.principal.actor, told)
            return None

    async def now(self) -> datetime:
        """The time by the clock of the books."""
        return self._books.now()

    async def get(self, tenant_id: UUID, run_id: UUID) -> Run:
        """One run."""
        async with self._books.turn() as books:
            return _read(books.run(tenant_id, run_id))

    async def list(
        self, tenant_id: UUID, *, limit: int, before: tuple[datetime, UUID] | None, state: RunState | None
    ) -> Sequence[Run]:
        """Newest first."""
        async with self._books.turn() as books:
            found = [
                row
                for row in books.run_states.rows(tenant_id)
                if (before is None or _place(row) < before) and (state is None or row["state"] == state.value)
            ]
            return [_read(row) for row in sorted(found, key=_place, reverse=True)[:limit]]

    async def steps(self, tenant_id: UUID, run_id: UUID, *, since: int = 0) -> Sequence[Step]:
        """Every attempt of every step from index `since` on, in order."""
        async with self._books.turn() as books:
            found = [row for row in books.run_steps.rows((tenant_id, run_id)) if row["step_index"] >= since]
            return [_read_step(books, row) for row in sorted(found, key=_attempt)]

    async def attempts(self, tenant_id: UUID, *, since: datetime) -> AsyncIterator[Sequence[Attempt]]:
        """Every proposal of the tenant that was decided since then, as one batch, oldest run first."""
        async with self._books.turn() as books:
            runs = sorted(row["run_id"] for row in books.run_states.rows(tenant_id))
            steps = [row for run in runs for row in sorted(books.run_steps.rows((tenant_id, run)), key=_attempt)]
            names = ("step_index", "attempt", "capability", "resource", "arguments", "decision")
            batch = [
                Attempt(
                    run_id=str(row["run_id"]),
                    spent=_spent(books, row),
                    **fresh({name: row[name] for name in names}),
                )
                for row in steps
                if row["created_at"] >= since and row["capability"] != PROVIDE_INPUT
            ]
        if batch:
            yield batch

    async def budgets(self, tenant_id: UUID, run_id: UUID) -> Sequence[Budget]:
        """The budgets a call of this run draws on."""
        async with self._books.turn() as books:
            run = books.run_states.get(tenant_id, run_id)
            if run is None:
                return []
            own: dict[str, Any] = {scope: run[column] for scope, column in _OWN.items()}
            found = [
                budget_row(row)
                for row in books.budgets.rows(tenant_id)
                if own.get(row["scope_kind"]) in (row["scope_id"], row["subject"] or row["scope_id"])
                and runs(row, books.now())
            ]
            return sorted(found, key=lambda each: each.width)

    async def request_cancel(self, tenant_id: UUID, run_id: UUID, *, actor: str) -> Run:
        """Cancel at once where nobody drives the run, else ask its worker; asking twice answers the same."""
        async with self._books.turn() as books:
            run = _read(books.run(tenant_id, run_id))
            if run.state is RunState.CANCELLED or (run.state is RunState.RUNNING and run.cancel_requested):
                return run
            if run.finished:
                raise Conflict(f"run {run_id} is already {run.state.value}", reason="impossible_transition")
            if run.state is RunState.OUTCOME_UNKNOWN:
                raise Conflict(
                    f"the outcome of a step of run {run_id} is unknown; reconcile it first", reason="outcome_unknown"
                )
            if run.state is RunState.RUNNING:
                now = books.now()
                books.run_states.change(tenant_id, run_id, cancel_requested_at=now, updated_at=now)
                kind = EventKind.RUN_CANCEL_REQUESTED
            else:
                _cancel_parked(books, tenant_id, run_id)
                kind = EventKind.RUN_CANCELLED
            books.append(tenant_id, run_stream(run_id), kind, actor, {"was": run.state.value, "by": actor})
            if run.state is RunState.RUNNING:
                # A dead worker's run is taken over and then finds the request.
                books.deliver(tenant_id, run_id)
            return _read(books.run(tenant_id, run_id))

    async def mark(self, command: MarkCommand) -> int:
        """Append a marker to the stream of a run that has not ended, once for each command id; answers its sequence."""
        tenant_id, name = command.tenant_id, (_MARK_OPERATION, storable_text(command.command_id))
        async with self._books.turn() as books:
            books.require_tenant(tenant_id)
            record = books.idempotency_records.get(tenant_id, name)
            if record is not None and record["digest"] != command.digest:
                raise IdempotencyConflict(f"command {command.command_id} was already used for another marker")
            if record is not None:
                return int(record["result"]["seq"])
            run = _read(books.run(tenant_id, command.run_id))
            if run.finished:
                raise Conflict(f"run {run.id} is already {run.state.value}", reason="impossible_transition")
            told = {"name": command.name, "details": dict(command.details)}
            seq = books.append(tenant_id, run_stream(run.id), EventKind.MARKER, command.actor, told)
            books.idempotency_records.put(tenant_id, name, {"digest": command.digest, "result": {"seq": seq}})
            return seq

    async def reconcile(self, tenant_id: UUID, run_id: UUID, *, happened: bool, output: Any, actor: str) -> Run:
        """Record what became of an unknown effect, and queue the run again."""
        state = StepState.SUCCEEDED if happened else StepState.NOT_STARTED
        async with self._books.turn() as books:
            run = _read(books.run(tenant_id, run_id))
            if run.state is not RunState.OUTCOME_UNKNOWN:
                raise Conflict(
                    f"run {run_id} is {run.state.value}; only a run in outcome_unknown can be reconciled",
                    reason="impossible_transition",
                )
            kept = kept_json(output, root="output") if output is not None else None
            said = {"state": state.value, "evidence": "reported", "output": kept, "finished_at": books.now()}
            group = (tenant_id, run_id)
            unknown = [_attempt(row) for row in books.run_steps.rows(group) if row["state"] == "outcome_unknown"]
            for attempt in unknown:
                books.run_steps.change(group, attempt, **said)
            books.queue_again(tenant_id, run_id, was=RunState.OUTCOME_UNKNOWN)
            steps = [{"step_index": index, "attempt": attempt} for index, attempt in unknown]
            payload = {"happened": happened, "steps": steps, "output": output}
            books.append(tenant_id, run_stream(run_id), EventKind.STEP_RECONCILED, actor, payload)
            books.deliver(tenant_id, run_id)
            return _read(books.run(tenant_id, run_id))

    async def mcrc(self, tenant_id: UUID, run_id: UUID) -> Mapping[str, Any]:
        """The run's row as `mcrc_v1_view` has it."""
        async with self._books.turn() as books:
            run = books.runs.get(tenant_id, run_id)
            if run is None:
                raise NotFound("run", run_id)
            return {
                "run_id": run_id,
                "tenant_id": tenant_id,
                "run_created_at": run["created_at"],
                "run_updated_at": run["updated_at"],
                "actor_kind": run["actor_kind"],
                "quality_level": run["quality_level"],
                **_calls(books, tenant_id, run_id, "llm"),
                **_calls(books, tenant_id, run_id, "connector"),
                **_telemetry(books, tenant_id, run_id),
            }

    async def artifact(self, tenant_id: UUID, artifact_id: UUID) -> ArtifactRow:
        """One artifact's record."""
        async with self._books.turn() as books:
            row = books.artifacts.get(None, artifact_id)
            if row is None or row["tenant_id"] != tenant_id:
                raise NotFound("artifact", artifact_id)
            return ArtifactRow(**{name: value for name, value in row.items() if name != "tenant_id"})

    async def unrecorded(self, tenant_id: UUID, artifact_ids: Sequence[UUID]) -> Sequence[UUID]:
        """Those of the ids that no artifact of the tenant has a record under."""
        async with self._books.turn() as books:
            if books.tenants.get(None, tenant_id) is None:
                return []
            found = {identifier: books.artifacts.get(None, identifier) for identifier in artifact_ids}
            return [each for each, row in found.items() if row is None or row["tenant_id"] != tenant_id]


def _claim_key(books: Books, new: NewRun) -> UUID | None:
    """Take the key; when an earlier creation has it, the run that it made."""
    earlier = _run_of_key(books, new)
    if earlier is None:
        result = {"run_id": str(new.run_id)}
        record = {"digest": new.request_digest, "result": result}
        books.idempotency_records.put(new.tenant_id, _key_of(new), record)
    return earlier


def _key_of(new: NewRun) -> tuple[str, str]:
    return (_CREATE_OPERATION, storable_text(new.idempotency_key or ""))


def _run_of_key(books: Books, new: NewRun) -> UUID | None:
    """The run that the key already stands for."""
    books.require_tenant(new.tenant_id)
    record = books.idempotency_records.get(new.tenant_id, _key_of(new))
    if record is None:
        return None
    if record["digest"] != new.request_digest:
        raise IdempotencyConflict(
            f"Idempotency-Key {new.idempotency_key!r} was already used for another request; send a new key"
        )
    return UUID(record["result"]["run_id"])


def _insert(books: Books, new: NewRun) -> None:
    kind, now = new.principal.actor_kind, books.now()
    if kind not in _ACTOR_KINDS:
        raise InvalidRequest(
            f'the database cannot hold a value of the request: invalid input value for enum actor_kind: "{kind}"'
        )
    if any(row["run_id"] == new.run_id for row in books.run_states.everything()):
        raise already_exists("runs_pkey")
    books.require_tenant(new.tenant_id)
    run = {"actor_kind": kind, "quality_level": "pending", "created_at": now, "updated_at": None}
    books.runs.put(new.tenant_id, new.run_id, run)
    state: dict[str, Any] = {"tenant_id": new.tenant_id, "run_id": new.run_id, "kind": new.kind.value}
    state |= {name: kept_json(dict(getattr(new, name)), root=name) for name in ("agent", "input")}
    state |= {"principal": kept_json(new.principal.to_json(), root="principal"), "policy_digest": new.policy_digest}
    state |= {"trace_id": new.trace_id, "root_span_id": new.root_span_id, "state": "queued", "fencing_token": 0}
    state |= {name: getattr(new.subjects, name) for name in ("agent_id", "run_group_id", "user_id", "team")}
    state |= {"created_at": now, "updated_at": now, "idempotency_key": new.idempotency_key}
    state |= dict.fromkeys(("lease_owner", "lease_expires_at", "cancel_requested_at", "reason", "message", "result"))
    books.run_states.put(new.tenant_id, new.run_id, {**state, "finished_at": None})
    _set_limits(books, new)
    for artifact in new.artifacts:
        write_artifact(books, new.tenant_id, {**vars(artifact), "run_id": new.run_id})


def _set_limits(books: Books, new: NewRun) -> None:
    decides = books.active_policy() in (None, new.policy_digest)
    scopes = ((BudgetScope.RUN, new.run_id, new.budget), (BudgetScope.TENANT, new.tenant_id, new.tenant_budget))
    for scope, scope_id, limits in scopes:
        for unit, limit in limits.items():
            name = (scope.value, scope_id, str(unit), "total", ALWAYS)
            if decides or books.budgets.get(new.tenant_id, name) is None:
                open_budget(books, new.tenant_id, name, limit, None)


def _cancel_parked(books: Books, tenant_id: UUID, run_id: UUID) -> None:
    run, now = books.run(tenant_id, run_id), books.now()
    if RunState(run["state"]) in sources_of(RunState.CANCELLED):
        ended: dict[str, Any] = {"state": "cancelled", "reason": "cancelled", "message": "cancelled on request"}
        ended |= {"fencing_token": run["fencing_token"] + 1}
        ended |= dict.fromkeys(("cancel_requested_at", "finished_at", "updated_at"), now)
        books.run_states.change(tenant_id, run_id, **ended)
    group = (tenant_id, run_id)
    for step in books.run_steps.rows(group):
        if step["state"] == "awaiting_approval":
            books.run_steps.change(group, _attempt(step), state="cancelled", finished_at=now)
    close_books(books, tenant_id, run_id)


def _calls(books: Books, tenant_id: UUID, run_id: UUID, kind: str) -> dict[str, Any]:
    rows = [row for row in books.ledger.rows((tenant_id, f"{kind}_calls")) if row["run_id"] == str(run_id)]
    costs = [Decimal(row["cost_eur"]) for row in rows if row["cost_eur"] is not None]
    pending = sum(row["cost_status"] == "pending" for row in rows)
    return {
        f"{kind}_call_count": len(rows),
        f"{kind}_cost_eur": sum(costs, Decimal(0)),
        f"{kind}_cost_pending_count": pending,
    }


def _telemetry(books: Books, tenant_id: UUID, run_id: UUID) -> dict[str, Any]:
    events = [
        row for row in books.ledger.rows((tenant_id, "telemetry_events")) if row["payload"].get("run_id") == str(run_id)
    ]
    last = events[-1] if events else {"trace_id": None, "span_id": None}
    return {
        "knowledge_call_count": sum(row["event_type"] == "knowledge_call" for row in events),
        "telemetry_event_count": len(events),
        "last_trace_id": last["trace_id"],
        "last_span_id": last["span_id"],
    }


def _place(row: Row) -> tuple[datetime, UUID]:
    return row["created_at"], row["run_id"]


def _attempt(row: Row) -> tuple[int, int]:
    return row["step_index"], row["attempt"]


def _read(row: Row) -> Run:
    return run_row(fresh(row))


def _spent(books: Books, step: Row) -> dict[str, str] | None:
    grant = books.grants.get(step["tenant_id"], step["grant_id"])
    settled = grant is not None and grant["state"] == "settled"
    return spent(books, step["tenant_id"], step["grant_id"]) if settled else None


def _read_step(books: Books, row: Row) -> Step:
    grant = books.grants.get(row["tenant_id"], row["grant_id"]) or {"span_id": None, "expires_at": None}
    return step_row({**fresh(row), "span_id": grant["span_id"], "grant_expires_at": grant["expires_at"]})
