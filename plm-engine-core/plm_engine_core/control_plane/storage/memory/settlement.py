"""Settlement, as `engine_settle` books it: the reservation becomes spend, outcome and ledger rows are written."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_shared.ledger import LedgerRecord

from plm_engine_core.control_plane.errors import Conflict, IdempotencyConflict
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.storage.commands import settle_json
from plm_engine_core.control_plane.storage.memory.books import Books, Row, refuse_connection
from plm_engine_core.control_plane.storage.memory.budgets import charge, spent
from plm_engine_core.control_plane.storage.memory.values import kept_json, text_at, without_nulls
from plm_engine_core.control_plane.storage.ports import Connection, SettleCommand

_IDENTITIES = {
    "telemetry_events": ("trace_id", "span_id", "event_type"),
    "llm_calls": ("span_id",),
    "connector_calls": ("span_id",),
}


class MemorySettlement:
    """The books of settlement in memory."""

    _books: Books

    async def settle(self, command: SettleCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book an outcome with its ledger rows."""
        refuse_connection(connection)
        outcome = kept_json(settle_json(command), root="outcome")
        async with self._books.turn() as books:
            grant, name = _hold_grant(books, command), (command.tenant_id, command.grant_id)
            if grant["state"] == "settled":
                return {"status": grant["outcome"], "spent": spent(books, *name), "replayed": True}
            if grant["state"] in ("issued", "revoked") and outcome["status"] != "not_started":
                raise Conflict(
                    f"grant {grant['id']} was never begun, so its call cannot have ended as {outcome['status']}",
                    reason="state",
                )
            cost = _book(books, grant, command, outcome)
            return {"status": outcome["status"], "spent": cost, "replayed": False}

    async def expire(self, command: SettleCommand) -> bool:
        """Book that a call never started because its grant ran out."""
        outcome = kept_json(settle_json(command), root="outcome") | {"status": "not_started"}
        async with self._books.turn() as books:
            run = books.run_states.get(command.tenant_id, command.run_id)
            grant = books.grants.get(command.tenant_id, command.grant_id)
            if run is None or run["state"] != "running" or grant is None or not runs_out(grant, books.now()):
                return False
            _book(books, grant, command, outcome)
            return True


def runs_out(grant: Row, now: datetime) -> bool:
    """Whether the time of a grant is over before its call began, and it still holds what it was given."""
    return grant["state"] in ("issued", "revoked") and bool(grant["expires_at"] <= now)


def ran_out(grant: Row) -> bool:
    """Whether a grant was closed because of that: there is no other outcome, whoever says so first."""
    unused = grant["state"] == "settled" and grant["outcome"] == "not_started" and grant["begun_at"] is None
    return unused and bool(grant["settled_at"] >= grant["expires_at"])


def _book(books: Books, grant: Row, command: SettleCommand, outcome: Mapping[str, Any]) -> dict[str, str]:
    """What a settlement writes; answers what it cost."""
    for record in command.ledger:
        _write_ledger(books, command.tenant_id, record)
    name = (command.tenant_id, command.grant_id)
    overrun = charge(books, *name, outcome["charges"])
    _write_outcome(books, grant, outcome)
    cost = spent(books, *name)
    _append(books, grant, outcome, cost, overrun=overrun)
    return cost


def _hold_grant(books: Books, command: SettleCommand) -> Row:
    """The grant, for who may settle it; the same outcome again is let through even after the run moved on."""
    attempt = (command.step_index, command.attempt)
    grant = books.grant_of(command.tenant_id, command.run_id, attempt, command.grant_id)
    if grant["state"] == "settled" and grant["outcome_digest"] == command.outcome_digest:
        return grant
    books.hold_run(command.tenant_id, command.run_id, command.fencing_token, live=False)
    if str(command.status) == "not_started" and ran_out(grant):
        return grant
    if grant["state"] == "settled":
        raise IdempotencyConflict(f"grant {command.grant_id} was already settled as {grant['outcome']}")
    return grant


def _write_ledger(books: Books, tenant_id: UUID, record: LedgerRecord) -> None:
    columns = record.columns
    identity = tuple(columns[name] for name in _IDENTITIES[record.table])
    known = books.ledger.get((tenant_id, record.table), identity)
    if known is None:
        books.ledger.put((tenant_id, record.table), identity, columns)
    elif known["idempotency_key"] != columns["idempotency_key"]:
        raise already_exists(f"uq_{record.table}_logical")


def _write_outcome(books: Books, grant: Row, outcome: Mapping[str, Any]) -> None:
    tenant_id, run_id, now = grant["tenant_id"], grant["run_id"], books.now()
    status = outcome["status"]
    closed = {"state": "settled", "settled_at": now, "outcome": status, "outcome_digest": outcome["outcome_digest"]}
    books.grants.change(tenant_id, grant["id"], **closed)
    columns = {name: outcome[name] for name in ("output", "error", "usage", "evidence")}
    attempt = (grant["step_index"], grant["attempt"])
    books.run_steps.change((tenant_id, run_id), attempt, state=status, finished_at=now, **columns)
    for artifact in outcome["artifacts"]:
        kept = {name: artifact[name] for name in ("mime_type", "size_bytes", "backend", "storage_uri")}
        kept |= {"id": UUID(artifact["id"]), "trace_id": outcome["trace_id"], "run_id": run_id}
        write_artifact(books, tenant_id, kept)
    if status == "outcome_unknown":
        message = text_at(outcome["error"], "message")
        parked = {"state": status, "reason": status, "message": message, "updated_at": now}
        books.run_states.change(tenant_id, run_id, lease_owner=None, lease_expires_at=None, **parked)


def _append(books: Books, grant: Row, outcome: Mapping[str, Any], cost: Mapping[str, str], *, overrun: bool) -> None:
    payload = {name: outcome[name] for name in ("status", "evidence", "outcome_digest", "error", "usage")}
    payload |= {"step": grant["step_index"], "attempt": grant["attempt"], "grant_id": str(grant["id"])}
    payload |= {"spent": cost, "overrun": overrun or None, "artifacts": outcome["artifacts"] or None}
    books.append(
        grant["tenant_id"], run_stream(grant["run_id"]), "step_settled", outcome["actor"], without_nulls(payload)
    )


def write_artifact(books: Books, tenant_id: UUID, artifact: Row) -> None:
    """Record a stored file.

    Raises:
        Conflict: its id exists, in whichever tenant.
    """
    if books.artifacts.get(None, artifact["id"]) is not None:
        raise already_exists("artifacts_pkey")
    books.artifacts.put(None, artifact["id"], {**artifact, "tenant_id": tenant_id})


def already_exists(constraint: str) -> Conflict:
    """What a row that is there already comes to."""
    text = f'duplicate key value violates unique constraint "{constraint}"'
    return Conflict(f"it exists already: {text}", reason="already_exists")
