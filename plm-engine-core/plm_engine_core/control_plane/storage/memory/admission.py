"""Admission and begin, as `storage/sql` has them: the same questions in the same order, the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.errors import FencingLost, IdempotencyConflict
from plm_engine_core.control_plane.limits import Assumed, Bucket, Prepared
from plm_engine_core.control_plane.policy.run_risk import GrantedAttempt
from plm_engine_core.control_plane.storage.commands import admit_json
from plm_engine_core.control_plane.storage.memory.admit import AdmitBooking, start
from plm_engine_core.control_plane.storage.memory.books import Books, Row, halted, refuse_connection
from plm_engine_core.control_plane.storage.memory.rates import take_tokens
from plm_engine_core.control_plane.storage.memory.settlement import MemorySettlement, ran_out
from plm_engine_core.control_plane.storage.memory.tickets import described_by
from plm_engine_core.control_plane.storage.memory.values import fresh, kept_json, text_time
from plm_engine_core.control_plane.storage.ports import CLOCK_TOLERANCE, AdmitCommand, Connection
from plm_engine_core.control_plane.storage.rows import subjects_row

_NEVER_GRANTED = ("denied", "steered", "awaiting_approval", "not_started")


class _NotAsAssumed(Exception):
    """Undoes a booking."""


class MemoryAdmission(MemorySettlement):
    """The books of admission and settlement in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def prepare(self, tenant_id: UUID, run_id: UUID, *, buckets: Sequence[Bucket]) -> Prepared:
        """Take one token of every bucket or of none, and read for whom the run works."""
        async with self._books.turn() as books:
            run = books.run_states.get(tenant_id, run_id)
            rate = take_tokens(books, tenant_id, run_id, run, buckets)
            return Prepared(rate=rate, at=books.now(), subjects=subjects_row(run) if run is not None else None)

    async def history(
        self, tenant_id: UUID, run_id: UUID, *, beside: tuple[int, int], limit: int
    ) -> tuple[Sequence[GrantedAttempt], int]:
        """The newest `limit` granted attempts beside this one, oldest first, and how many are older."""
        async with self._books.turn() as books:
            found = [
                row
                for row in books.run_steps.rows((tenant_id, run_id))
                if (row["step_index"], row["attempt"]) != beside
                and row["state"] not in _NEVER_GRANTED
                and row["grant_id"] is not None
            ]
            found.sort(key=lambda row: (row["created_at"], row["step_index"], row["attempt"]))
            older = max(0, len(found) - limit)
            return [GrantedAttempt(row["step_index"], row["capability"]) for row in found[older:]], older

    async def decided_on(
        self, tenant_id: UUID, run_id: UUID, step_index: int, attempt: int, *, connection: Connection | None = None
    ) -> Any:
        """The capability as the recorded decision of an attempt describes it."""
        refuse_connection(connection)
        async with self._books.turn() as books:
            step = books.run_steps.get((tenant_id, run_id), (step_index, attempt))
            described = described_by(step["decision"]) if step is not None else None
            return fresh(described) if isinstance(described, Mapping) else described

    async def admit(self, command: AdmitCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book a decision; the same command again answers the same."""
        refuse_connection(connection)
        booking = kept_json(admit_json(command), root="proposal")
        async with self._books.turn() as books:
            return self._admitted(books, command, booking)

    async def admit_as_assumed(self, command: AdmitCommand, assumed: Assumed) -> Mapping[str, Any]:
        """Book a decision, and hold it to what it assumed."""
        booking = kept_json(admit_json(command), root="proposal")
        try:
            async with self._books.turn() as books:
                _compare_clock(books, assumed)
                answer = self._admitted(books, command, booking)
                _take_assumed(books, command, assumed)
                return answer
        except _NotAsAssumed:
            return {"status": "not_as_assumed"}

    def _admitted(self, books: Books, command: AdmitCommand, booking: Any) -> Mapping[str, Any]:
        books.require_tenant(command.tenant_id)
        name = ("admit", command.command_id)
        record = books.idempotency_records.get(command.tenant_id, name)
        if record is not None:
            if record["digest"] != command.command_digest:
                raise IdempotencyConflict(f"command {command.command_id} was already used for another proposal")
            return fresh({**_recalled(books, command, record["result"]), "replayed": True})
        answer = AdmitBooking(books, booking).book()
        if answer["status"] == "policy_changed":
            return answer
        record = {"digest": command.command_digest, "result": answer}
        books.idempotency_records.put(command.tenant_id, name, record)
        return fresh(answer)

    async def begin(self, grant: Grant, *, fencing_token: int, actor: str) -> Mapping[str, Any]:
        """Use a grant up."""
        async with self._books.turn() as books:
            halt = books.standing_halt(grant.tenant_id, grant.run_id, capability=_capability(books, grant))
            run = books.hold_run(grant.tenant_id, grant.run_id, fencing_token, live=True)
            if halt is not None:
                refusal = {name: value for name, value in halted(halt).items() if name != "outcome"}
                return {"status": "refused", **refusal}
            if run["cancel_requested_at"] is not None:
                return _refused("cancel_requested", "the run is being cancelled")
            kept = books.grant_of(grant.tenant_id, grant.run_id, (grant.step_index, grant.attempt), grant.id)
            _compare_holder(kept, fencing_token)
            if kept["state"] == "revoked":
                return _refused("halted", f"grant {grant.id} was revoked by a halt; its call has to be admitted anew")
            if kept["state"] != "issued" and not ran_out(kept):
                return _used(kept)
            if kept["expires_at"] <= books.now():
                expired = text_time(kept["expires_at"])
                return _refused("grant_expired", f"grant {grant.id} expired at {expired} before its call could start")
            start(books, kept, actor)
            return {"status": "begun"}


def _recalled(books: Books, command: AdmitCommand, answer: Row) -> Row:
    """What a command was answered before; a grant that it used up is its holder's, until it is settled."""
    if not answer.get("begun"):
        return answer
    books.hold_run(command.tenant_id, command.run_id, command.fencing_token, live=True)
    attempt, grant_id = (command.step_index, command.attempt), UUID(answer["grant_id"])
    kept = books.grant_of(command.tenant_id, command.run_id, attempt, grant_id)
    _compare_holder(kept, command.fencing_token)
    return answer if kept["state"] == "begun" else {**_used(kept), "status": "denied"}


def _compare_holder(grant: Row, fencing_token: int) -> None:
    if grant["fencing_token"] != fencing_token:
        raise FencingLost(f"grant {grant['id']} belongs to an earlier holder of the lease of run {grant['run_id']}")


def _used(grant: Row) -> dict[str, Any]:
    return _refused("grant_used", f"grant {grant['id']} is {grant['state']}; a grant is used once")


def _compare_clock(books: Books, assumed: Assumed) -> None:
    if abs(books.now() - assumed.at) > CLOCK_TOLERANCE:
        raise _NotAsAssumed


def _take_assumed(books: Books, command: AdmitCommand, assumed: Assumed) -> None:
    run = books.run_states.get(command.tenant_id, command.run_id)
    if not take_tokens(books, command.tenant_id, command.run_id, run, assumed.buckets).allowed:
        raise _NotAsAssumed


def _capability(books: Books, grant: Grant) -> str | None:
    """What a grant is for."""
    step = books.run_steps.get((grant.tenant_id, grant.run_id), (grant.step_index, grant.attempt))
    return step["capability"] if step is not None else None


def _refused(reason: str, message: str) -> dict[str, Any]:
    return {"status": "refused", "reason": reason, "message": message}
