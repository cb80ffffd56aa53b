"""The books: tables of rows under one lock, in transactions that leave everything or nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import FencingLost, InvalidRequest, NotFound
from plm_engine_core.control_plane.events.chain import link_hash
from plm_engine_core.control_plane.events.event import microseconds
from plm_engine_core.control_plane.runs.run import still_wants
from plm_engine_core.control_plane.storage.memory.values import json_text, kept_json, storable_text
from plm_engine_core.control_plane.vocabulary import PolicyRole, RunState

Clock = Callable[[], datetime]
"""Answers the time, with its zone."""

Deliver = Callable[[UUID, UUID], None]
"""Notes down "drive this run" for tenant and run. It is called inside the transaction: what it raises undoes all of it,
and it must neither wait nor come back to the storage."""

Row = Mapping[str, Any]

_ABSENT: Any = object()


def system_clock() -> datetime:
    """The time of this machine."""
    return datetime.now(UTC)


def deliver_nothing(tenant_id: UUID, run_id: UUID) -> None:
    """For who drives runs without being told."""


class Table:
    """Rows by group and key, as columns by name. A row is replaced, never changed; each group belongs to one tenant."""

    def __init__(self, undo: list[tuple[dict[Any, Any], Any, Any]]) -> None:
        self._groups: dict[Any, dict[Any, Row]] = {}
        self._undo = undo

    def get(self, group: Any, key: Any) -> Row | None:
        """One row."""
        return self._groups.get(group, {}).get(key)

    def rows(self, group: Any) -> list[Row]:
        """The rows of a group, in the order in which they came."""
        return list(self._groups.get(group, {}).values())

    def items(self, group: Any) -> list[tuple[Any, Row]]:
        """The rows of a group with their keys, in the order in which they came."""
        return list(self._groups.get(group, {}).items())

    def everything(self) -> list[Row]:
        """The rows of all groups: the one look across tenants."""
        return [row for rows in self._groups.values() for row in rows.values()]

    def put(self, group: Any, key: Any, row: Row) -> Row:
        """Set one row."""
        rows = self._groups.setdefault(group, {})
        self._undo.append((rows, key, rows.get(key, _ABSENT)))
        rows[key] = row
        return row

    def change(self, group: Any, key: Any, **columns: Any) -> Row:
        """Change columns of a row that is there."""
        return self.put(group, key, {**self._groups[group][key], **columns})

    def remove(self, group: Any, key: Any) -> None:
        """Remove a row that is there."""
        rows = self._groups[group]
        self._undo.append((rows, key, rows.pop(key)))


class Books:
    """Every table, the clock, and what all bookings start and end with.

    Tables have the columns that the database's have; `storage/rows.py` reads both.
    """

    def __init__(self, clock: Clock, deliver: Deliver) -> None:
        self._lock = threading.RLock()
        self._open = False
        self.transactions = 0  # how many there were, which is what a feed is ordered by
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self.now = clock
        self.deliver = deliver
        self.tenants = self._table()  # all in one group, by id
        self.runs = self._table()  # by tenant and run
        self.run_states = self._table()  # by tenant and run
        self.run_steps = self._table()  # by (tenant, run) and (index, attempt)
        self.approval_tickets = self._table()  # by tenant and id
        self.approval_votes = self._table()  # by (tenant, ticket) and voter
        self.approval_comments = self._table()  # by (tenant, ticket) and id
        self.approval_scopes = self._table()  # by tenant and id
        self.grants = self._table()  # by tenant and id
        self.reservations = self._table()  # by (tenant, grant) and the name of the budget
        self.budgets = self._table()  # by tenant and name: (scope, scope id, unit, period, start)
        self.windows = self._table()  # by (tenant, scope, scope id, unit, period) and start: which there are in budgets
        self.halts = self._table()  # by tenant and id
        self.halts_system = self._table()  # all in one group, by id
        self.halt_calls = self._table()  # by (tenant, halt) and grant
        self.resource_leases = self._table()  # by tenant and name
        self.resource_locks = self._table()  # by tenant and (scope, scope id, resource)
        self.policy_versions = self._table()  # all in one group, by digest
        self.policy_activations = self._table()  # all in one group, by number
        self.idempotency_records = self._table()  # by tenant and (operation, command id)
        self.rate_buckets = self._table()  # by tenant and dimension
        self.artifacts = self._table()  # all in one group, by id
        self.ledger = self._table()  # by (tenant, table) and the logical identity
        self.event_streams = self._table()  # by tenant and name
        self.events = self._table()  # by (tenant, stream) and sequence
        self.event_checkpoints = self._table()  # by tenant and number
        self.event_exports = self._table()  # by tenant and number

    def _table(self) -> Table:
        return Table(self._undo)

    @contextmanager
    def transaction(self) -> Iterator[Books]:
        """Hold the lock; on any exception everything is as it was before."""
        with self._lock:
            if self._open:
                raise RuntimeError("a delivery came back to the storage from within its transaction; note the job down")
            self._open = True
            self.transactions += 1
            try:
                yield self
            except BaseException:
                for rows, key, before in reversed(self._undo):
                    if before is _ABSENT:
                        del rows[key]
                    else:
                        rows[key] = before
                raise
            finally:
                self._undo.clear()
                self._open = False

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Books]:
        """A transaction after everybody else on this event loop had their turn, as when a database is waited for."""
        await asyncio.sleep(0)
        with self.transaction():
            yield self

    def require_tenant(self, tenant_id: UUID) -> None:
        """Refuse what belongs to nobody."""
        if self.tenants.get(None, tenant_id) is None:
            raise NotFound("tenant", "of this request")

    def run(self, tenant_id: UUID, run_id: UUID) -> Row:
        """A run's row, or NotFound."""
        row = self.run_states.get(tenant_id, run_id)
        if row is None:
            raise NotFound("run", run_id)
        return row

    def hold_run(self, tenant_id: UUID, run_id: UUID, fencing_token: int, *, live: bool) -> Row:
        """A run's row, for who holds its lease; new effects need a live one, recording what happened does not."""
        run = self.run(tenant_id, run_id)
        expired = run["lease_expires_at"] is None or run["lease_expires_at"] <= self.now()
        if run["fencing_token"] != fencing_token or run["state"] != "running" or (live and expired):
            raise FencingLost(f"the lease of run {run_id} is no longer held with fencing token {fencing_token}")
        return run

    def grant_of(self, tenant_id: UUID, run_id: UUID, attempt: tuple[int, int], grant_id: UUID) -> Row:
        """The grant of an attempt, or NotFound."""
        row = self.grants.get(tenant_id, grant_id)
        if row is None or (row["run_id"], row["step_index"], row["attempt"]) != (run_id, *attempt):
            raise NotFound("grant", grant_id)
        return row

    def active_policy(self) -> str | None:
        """The digest of the policy that was activated last."""
        made = (row["activation"] for row in reversed(self.policy_activations.rows(None)))
        return next((each.digest for each in made if each.role is PolicyRole.ACTIVE), None)

    def standing_halt(self, tenant_id: UUID, run_id: UUID, *, capability: str | None = None) -> dict[str, Any] | None:
        """The widest standing halt over a run, or over its use of a capability."""
        for row in self.halts_system.rows(None):
            if row["lifted_at"] is None:
                return _halt_json("system", row)
        run = self.run_states.get(tenant_id, run_id) or {"run_group_id": None, "agent_id": None}
        above = {"tenant": tenant_id, "agent": run["agent_id"], "run_group": run["run_group_id"], "run": run_id}
        above["capability"] = capability
        standing = {
            row["scope"]: row
            for row in self.halts.rows(tenant_id)
            if row["lifted_at"] is None and (row["subject"] or row["scope_id"]) == above[row["scope"]]
        }
        return next((_halt_json(scope, standing[scope]) for scope in above if scope in standing), None)

    def run_halt(self, tenant_id: UUID, run_id: UUID) -> dict[str, Any] | None:
        """The widest standing halt over a run as it is now; see `engine_run_halt_v2`."""
        return self.standing_halt(tenant_id, run_id, capability=self.wanted(tenant_id, run_id))

    def wanted(self, tenant_id: UUID, run_id: UUID) -> str | None:
        """The capability that the newest attempt of a run still wants to use."""
        steps = self.run_steps.rows((tenant_id, run_id))
        last = max(steps, key=lambda step: (step["step_index"], step["attempt"]), default=None)
        return last["capability"] if last is not None and still_wants(last["state"], last["error"]) else None

    def queue_again(self, tenant_id: UUID, run_id: UUID, *, was: RunState) -> None:
        """Queue a parked run; the caller delivers it and records why."""
        if self.run(tenant_id, run_id)["state"] == was.value:
            queued = {"state": "queued", "reason": None, "message": None, "updated_at": self.now()}
            self.run_states.change(tenant_id, run_id, **queued)

    def append(self, tenant_id: UUID, stream: str, kind: str, actor: str, payload: Mapping[str, Any]) -> int:
        """Append one event to a dense hash chain and answer its sequence."""
        self.require_tenant(tenant_id)
        text = json_text(kept_json(dict(payload), root="event"))
        storable_text(actor)
        head = self.event_streams.get(tenant_id, stream) or {"last_seq": 0, "last_hash": b"", "last_position": 0}
        seq: int = head["last_seq"] + 1
        before, at = head["last_hash"], self.now()
        position = max(head["last_position"], self.transactions)
        link = link_hash(tenant_id, stream, seq, before, kind, actor, microseconds(at), text)
        moved = {"stream": stream, "last_seq": seq, "last_hash": link, "last_position": position}
        self.event_streams.put(tenant_id, stream, moved)
        event = {"tenant_id": tenant_id, "stream": stream, "seq": seq, "prev_hash": before, "hash": link}
        event |= {"kind": str(kind), "actor": actor, "occurred_at": at, "payload": text, "feed_position": position}
        self.events.put((tenant_id, stream), seq, event)
        return seq


def refuse_connection(connection: object) -> None:
    """There is no transaction of a caller's that could hold what is booked here."""
    if connection is not None:
        raise InvalidRequest("the storage in memory takes no connection; leave it out", field="connection")


def halted(halt: Mapping[str, Any]) -> dict[str, Any]:
    """How a halt refuses."""
    return {
        "outcome": "deny",
        "reason": "halted",
        "halt": dict(halt),
        "rule": "halt",
        "message": f"a {halt['scope']} halt stands: {halt['reason']}",
        "unblock": f"lifting the halt {halt['id']}",
    }


def _halt_json(scope: str, row: Row) -> dict[str, Any]:
    halt = {"id": str(row["id"]), "epoch": row["epoch"], "scope": scope, "reason": row["reason"]}
    return {**halt, "subject": row["subject"]} if row.get("subject") else halt
