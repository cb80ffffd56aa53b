"""Leases: who moves a run forward, and how it is given back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import FencingLost
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.limits.leases import LONGEST_LEASE_SECONDS, check_seconds
from plm_engine_core.control_plane.runs.run import Heartbeat, Lease, Orphan
from plm_engine_core.control_plane.storage.leasing import FINISH_KINDS, RECOVERY, open_call
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.settlement import runs_out
from plm_engine_core.control_plane.storage.memory.tickets import tickets_of, time_out_tickets
from plm_engine_core.control_plane.storage.memory.values import fresh, kept_json, storable_text
from plm_engine_core.control_plane.storage.rows import run_row
from plm_engine_core.control_plane.vocabulary import TERMINAL_RUN_STATES, EventKind, RunKind, RunState

_LONGEST = timedelta(seconds=LONGEST_LEASE_SECONDS)
_UNSETTLED = ("granted", "running", "outcome_unknown")


class MemoryLeases:
    """Leases in memory, by the clock of the books only."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def take(
        self, tenant_id: UUID, run_id: UUID, *, owner: str, seconds: float, kind: RunKind = RunKind.HOSTED
    ) -> Lease | None:
        """Take the lease; the fencing token grows with every holder. A queued run under a halt is parked instead."""
        check_seconds(seconds)
        async with self._books.turn() as books:
            time_out_tickets(books, tenant_id, run_id, RECOVERY)
            run, now = books.run_states.get(tenant_id, run_id), books.now()
            if run is None or run["kind"] != kind.value or not _takeable(run, now):
                return None
            halt = books.run_halt(tenant_id, run_id)
            if halt is not None and run["state"] == "queued":
                _park(books, run, halt, owner)
                return None
            taken: dict[str, Any] = {"state": "running", "lease_owner": storable_text(owner)}
            taken |= {
                "reason": None,
                "message": None,
                "lease_expires_at": now + timedelta(seconds=seconds),
                "updated_at": now,
            }
            row = books.run_states.change(tenant_id, run_id, fencing_token=run["fencing_token"] + 1, **taken)
            held = run_row(fresh(row))
            payload = {"fencing_token": held.fencing_token}
            books.append(tenant_id, run_stream(run_id), EventKind.RUN_TAKEN, f"worker:{owner}", payload)
            return Lease(run=held, fencing_token=held.fencing_token)

    async def renew(self, tenant_id: UUID, run_id: UUID, *, fencing_token: int, seconds: float) -> Heartbeat:
        """Renew while nobody else took the run."""
        check_seconds(seconds)
        async with self._books.turn() as books:
            run = books.run_states.get(tenant_id, run_id)
            if run is None or run["fencing_token"] != fencing_token or run["state"] != "running":
                return Heartbeat(held=False)
            expires_at = books.now() + timedelta(seconds=seconds)
            books.run_states.change(tenant_id, run_id, lease_expires_at=expires_at)
            cancel = run["cancel_requested_at"] is not None
            return Heartbeat(held=True, cancel_requested=cancel, halt=books.run_halt(tenant_id, run_id))

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
        """Give the lease back; a run is parked as halted only while a halt stands, else it is queued again."""
        kept = kept_json(result, root="result") if result is not None else None
        async with self._books.turn() as books:
            if state is RunState.HALTED and books.run_halt(tenant_id, run_id) is None:
                state, reason, message = RunState.QUEUED, None, None
            run = books.run_states.get(tenant_id, run_id)
            if run is None or run["fencing_token"] != fencing_token or run["state"] != "running":
                raise FencingLost(f"run {run_id} is no longer held with fencing token {fencing_token}")
            terminal, now = state in TERMINAL_RUN_STATES, books.now()
            left = {"state": state.value, "reason": _text(reason), "message": _text(message), "result": kept}
            free = {"lease_owner": None, "lease_expires_at": None, "updated_at": now}
            books.run_states.change(tenant_id, run_id, finished_at=now if terminal else None, **left, **free)
            if terminal:
                close_books(books, tenant_id, run_id)
            payload = {key: value for key, value in left.items() if value is not None}
            books.append(tenant_id, run_stream(run_id), FINISH_KINDS[state], actor, payload)
            if state is RunState.QUEUED and again_after_seconds > 0:
                asyncio.get_running_loop().call_later(again_after_seconds, books.deliver, tenant_id, run_id)
            elif state is RunState.QUEUED:
                books.deliver(tenant_id, run_id)
            return state

    async def abandoned(self, limit: int, *, patience_seconds: float) -> Sequence[tuple[UUID, UUID]]:
        """Runs that nobody drives although somebody should, over all tenants."""
        async with self._books.turn() as books:
            found = [run for run in books.run_states.everything() if _is_abandoned(books, run, patience_seconds)]
            found.sort(key=lambda run: run["updated_at"])
            return [(run["tenant_id"], run["run_id"]) for run in found[:limit]]

    async def orphaned(self, limit: int, *, forsaken_seconds: float) -> Sequence[Orphan]:
        """Runs of kind `external` that their holder left, over all tenants."""
        async with self._books.turn() as books:
            forsaken = books.now() - timedelta(seconds=forsaken_seconds)
            found = [run for run in books.run_states.everything() if _is_orphaned(books, run, forsaken)]
            found.sort(key=lambda run: run["updated_at"])
            return [
                Orphan(
                    tenant_id=run["tenant_id"],
                    run_id=run["run_id"],
                    fencing_token=run["fencing_token"],
                    forsaken=run["state"] == "queued" and run["updated_at"] <= forsaken,
                )
                for run in found[:limit]
            ]

    async def expired(self, limit: int) -> Sequence[tuple[UUID, UUID]]:
        """Running runs, over all tenants, with a grant that ran out before its call began."""
        async with self._books.turn() as books:
            now = books.now()
            out = {(each["tenant_id"], each["run_id"]) for each in books.grants.everything() if runs_out(each, now)}
            runs = (each for each in books.run_states.everything() if each["state"] == "running")
            found = [each for each in runs if (each["tenant_id"], each["run_id"]) in out]
            found.sort(key=lambda run: run["updated_at"])
            return [(run["tenant_id"], run["run_id"]) for run in found[:limit]]

    async def revive(self, tenant_id: UUID, run_id: UUID, *, patience_seconds: float) -> bool:
        """Enqueue a drive job if the run is still abandoned; taking its lease settles everything else."""
        async with self._books.turn() as books:
            expired = time_out_tickets(books, tenant_id, run_id, RECOVERY)
            run = books.run_states.get(tenant_id, run_id)
            abandoned = run is not None and _is_abandoned(books, run, patience_seconds)
            if run is None or not (abandoned or expired):
                return False
            if abandoned:
                books.run_states.change(tenant_id, run_id, updated_at=books.now())
                was = RunState(run["state"])
                if was in (RunState.HALTED, RunState.AWAITING_APPROVAL):
                    books.queue_again(tenant_id, run_id, was=was)
                    payload = {"was": was.value}
                    books.append(tenant_id, run_stream(run_id), EventKind.RUN_RESUMED, RECOVERY, payload)
            books.deliver(tenant_id, run_id)
            return True

    async def ahead(self, limit: int, *, patience_seconds: float) -> Sequence[tuple[UUID, UUID]]:
        """Runs, over all tenants, whose times a clock wrote that was ahead."""
        async with self._books.turn() as books:
            found = (run for run in books.run_states.everything() if _is_ahead(run, books.now(), patience_seconds))
            return [(run["tenant_id"], run["run_id"]) for run in islice(found, limit)]

    async def set_back(self, tenant_id: UUID, run_id: UUID, *, patience_seconds: float) -> bool:
        """Count the times of a run from now on, if they still lie ahead."""
        async with self._books.turn() as books:
            run, now = books.run_states.get(tenant_id, run_id), books.now()
            if run is None or not _is_ahead(run, now, patience_seconds):
                return False
            updated, ends = run["updated_at"], run["lease_expires_at"]
            if ends is not None:
                given = min(_LONGEST, ends - updated) if ends > updated > now else _LONGEST
                ends = min(ends, now + given)
            books.run_states.change(tenant_id, run_id, updated_at=min(updated, now), lease_expires_at=ends)
            return True


def _park(books: Books, run: Row, halt: dict[str, Any], owner: str) -> None:
    """Park a queued run under a halt."""
    told = {"state": "halted", "reason": "halted", "message": f"a {halt['scope']} halt stands: {halt['reason']}"}
    books.run_states.change(run["tenant_id"], run["run_id"], **told, result=None, updated_at=books.now())
    books.append(run["tenant_id"], run_stream(run["run_id"]), EventKind.RUN_PARKED, f"worker:{owner}", told)


def _text(value: str | None) -> str | None:
    return storable_text(value) if value is not None else None


def _takeable(run: Row, now: datetime) -> bool:
    if run["state"] == "running":
        return run["lease_expires_at"] is not None and run["lease_expires_at"] <= now
    return bool(run["state"] == "queued")


def _is_ahead(run: Row, now: datetime, patience_seconds: float) -> bool:
    latest, ends = now + timedelta(seconds=patience_seconds), run["lease_expires_at"]
    too_long = ends is not None and ends > latest + _LONGEST
    return run["state"] in ("queued", "running") and (run["updated_at"] > latest or too_long)


def _is_orphaned(books: Books, run: Row, forsaken: datetime) -> bool:
    if run["kind"] != "external":
        return False
    if run["state"] != "queued":
        return run["state"] == "running" and _takeable(run, books.now())
    grants = books.grants.rows(run["tenant_id"])
    left = any(each["run_id"] == run["run_id"] and each["state"] != "settled" for each in grants)
    return left or run["updated_at"] <= forsaken


def _is_abandoned(books: Books, run: Row, patience_seconds: float) -> bool:
    if run["kind"] != "hosted" and run["state"] in ("queued", "running"):
        return False
    now = books.now()
    waited = run["updated_at"] <= now - timedelta(seconds=patience_seconds)
    match run["state"]:
        case "queued":
            return bool(waited)
        case "running":
            ends = run["lease_expires_at"]
            return ends is not None and ends <= now and (run["updated_at"] <= ends or waited)
        case "awaiting_approval":
            tickets = tickets_of(books, run["tenant_id"], run["run_id"])
            return not any(each["state"] == "pending" and each["deadline"] > now for each in tickets)
        case "halted":
            return books.run_halt(run["tenant_id"], run["run_id"]) is None
        case _:
            return False


def close_books(books: Books, tenant_id: UUID, run_id: UUID) -> None:
    """What ends with a run: questions still open to humans, and the time in which its quality is undecided."""
    for grant in books.grants.rows(tenant_id):
        if grant["run_id"] == run_id and grant["state"] != "settled":
            raise open_call(run_id, grant["id"])
    for ticket in tickets_of(books, tenant_id, run_id):
        if ticket["state"] == "pending":
            books.approval_tickets.change(tenant_id, ticket["id"], state="cancelled")
    if (run := books.runs.get(tenant_id, run_id)) is not None and run["quality_level"] == "pending":
        level = _quality(books, tenant_id, run_id)
        books.runs.change(tenant_id, run_id, quality_level=level, updated_at=books.now())


def _quality(books: Books, tenant_id: UUID, run_id: UUID) -> str:
    """The published rule, as `storage/postgres/leases.py` states it."""
    steps = books.run_steps.rows((tenant_id, run_id))
    if any(step["state"] in _UNSETTLED for step in steps):
        return "pending"
    writes = [
        step for step in steps if step["state"] == "succeeded" and step["decision"].get("mode") not in (None, "read")
    ]
    if not writes or any(step["evidence"] != "verified" for step in writes):
        return "bronze"
    covered = _under_approval_scopes(books, tenant_id, run_id)

    def approved(step: Row) -> bool:
        ticket = books.approval_tickets.get(tenant_id, step["ticket_id"])
        by_itself = ticket is not None and ticket["consumed_at"] is not None
        return by_itself or (step["step_index"], step["attempt"]) in covered

    return "gold" if all(map(approved, writes)) else "silver"


def _under_approval_scopes(books: Books, tenant_id: UUID, run_id: UUID) -> set[tuple[int, int]]:
    """The attempts that an approval scope let through, by the events of their grants."""
    granted = [
        json.loads(event["payload"])
        for event in books.events.rows((tenant_id, run_stream(run_id)))
        if event["kind"] == "step_granted"
    ]
    return {(each["step"], each["attempt"]) for each in granted if each["answer"].get("approval_scope_id")}
