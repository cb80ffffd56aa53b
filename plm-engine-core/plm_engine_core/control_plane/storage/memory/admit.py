"""One admission, as `engine_admit` books it: refuses, parks on a ticket, or reserves and grants."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import Conflict
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.storage.memory.books import Books, Row, halted
from plm_engine_core.control_plane.storage.memory.budgets import hold_reservations, reserve
from plm_engine_core.control_plane.storage.memory.resource_locks import take_lock
from plm_engine_core.control_plane.storage.memory.tickets import approval_now, open_ticket, use_approval
from plm_engine_core.control_plane.storage.memory.values import json_time, without_nulls

_STEP_STATES = {"allow": "granted", "ask": "awaiting_approval", "steer": "steered"}
_DECIDED = ("outcome", "reason", "message", "rule", "unblock", "guidance", "retry_after_ms")
_NOT_ANSWERED = ("outcome", "reserved", "opens")
BEING_CANCELLED = {
    "outcome": "deny",
    "reason": "cancel_requested",
    "rule": "cancel",
    "message": "the run is being cancelled",
    "unblock": "nothing: somebody cancelled the run",
}


def policy_changed(decided: str, active: str) -> dict[str, Any]:
    """What is answered, and not kept, where another policy was activated since a decision."""
    words = f"policy {decided[:12]} decided, and meanwhile policy {active[:12]} was activated"
    return {"status": "policy_changed", "message": words}


def start(books: Books, grant: Row, actor: str) -> None:
    """Use a grant up: its call may leave the host once this is kept."""
    tenant_id, run_id, now = grant["tenant_id"], grant["run_id"], books.now()
    attempt = (grant["step_index"], grant["attempt"])
    books.grants.change(tenant_id, grant["id"], state="begun", begun_at=now)
    books.run_steps.change((tenant_id, run_id), attempt, state="running", started_at=now)
    payload = {"step": attempt[0], "attempt": attempt[1], "grant_id": str(grant["id"])}
    books.append(tenant_id, run_stream(run_id), "step_started", actor, payload)


class AdmitBooking:
    """Books one command, `admit_json` as it is kept; to be used inside a transaction."""

    def __init__(self, books: Books, command: Mapping[str, Any]) -> None:
        self._books = books
        self._c = command
        self._tenant = UUID(command["tenant_id"])
        self._run = UUID(command["run_id"])
        self._attempt = (command["step_index"], command["attempt"])

    def book(self) -> dict[str, Any]:
        """The answer, after everything it says was written."""
        active = self._books.active_policy()
        halt = self._books.standing_halt(self._tenant, self._run, capability=self._c["capability"])
        run = self._books.hold_run(self._tenant, self._run, self._c["fencing_token"], live=True)
        if active is not None and active != self._c["policy_digest"]:
            return policy_changed(self._c["policy_digest"], active)
        cancelling = run["cancel_requested_at"] is not None
        verdict = self._verdict(halt, cancelling=cancelling)
        state = _STEP_STATES.get(verdict["outcome"] or "", "denied")
        if state == "awaiting_approval" and verdict.get("ticket_id") is None:
            verdict |= {"ticket_id": self._c["ticket"]["id"], "opens": True}
        answer: dict[str, Any] = without_nulls(
            {name: value for name, value in verdict.items() if name not in _NOT_ANSWERED}
        )
        answer |= {"status": "pending" if state == "awaiting_approval" else state, "replayed": False}
        self._write_step(state, answer)
        if state == "granted":
            answer |= self._grant(verdict)
        elif state == "awaiting_approval":
            answer |= self._park(verdict, answer)
        self._append(state, verdict, answer)
        if state == "granted" and self._c["begin"]:
            issued = self._books.grant_of(self._tenant, self._run, self._attempt, UUID(answer["grant_id"]))
            start(self._books, issued, self._c["actor"])
            answer["begun"] = True
        return answer

    def _verdict(self, halt: Mapping[str, Any] | None, *, cancelling: bool) -> dict[str, Any]:
        """What policy decided, as far as the books agree."""
        verdict = {name: self._c["decision"].get(name) for name in _DECIDED}
        if halt is not None:
            verdict |= halted(halt)
        elif cancelling and self._c["begin"]:
            verdict |= BEING_CANCELLED
        elif verdict["outcome"] == "ask":
            verdict |= approval_now(self._books, self._c)
        if verdict["outcome"] == "allow" and "lock" in self._c:
            verdict |= take_lock(self._books, self._c)
        if verdict["outcome"] == "allow":
            verdict |= reserve(self._books, self._tenant, self._c["reserve"])
        return verdict

    def _write_step(self, state: str, answer: Mapping[str, Any]) -> None:
        """Write the attempt as it now stands; one that waited for approval is decided once more, any other never."""
        c, group = self._c, (self._tenant, self._run)
        before = self._books.run_steps.get(group, self._attempt)
        if before is not None and (before["state"] != "awaiting_approval" or before["step_id"] != c["step_id"]):
            raise Conflict(
                f"attempt {self._attempt[1]} of step {self._attempt[0]} of run {self._run} was already decided",
                reason="state",
            )
        ticket_id = UUID(answer["ticket_id"]) if answer.get("ticket_id") is not None else None
        columns = {name: c[name] for name in ("decision", "capability", "resource", "arguments")}
        columns |= {
            "state": state,
            "grant_id": UUID(c["grant"]["id"]) if state == "granted" else None,
            "error": dict(answer) if state in ("denied", "steered") else None,
            "ticket_id": (before or {}).get("ticket_id") or ticket_id,
            "arguments_digest": c["digest"],
        }
        self._books.run_steps.put(group, self._attempt, {**(before or self._new_step()), **columns})

    def _new_step(self) -> Row:
        step: dict[str, Any] = {"tenant_id": self._tenant, "run_id": self._run, "created_at": self._books.now()}
        step |= {name: self._c[name] for name in ("step_index", "attempt", "step_id", "step_key", "executor_kind")}
        return {**step, **dict.fromkeys(("evidence", "output", "usage", "started_at", "finished_at"))}

    def _grant(self, verdict: Mapping[str, Any]) -> dict[str, Any]:
        c, books = self._c, self._books
        grant_id, now = UUID(c["grant"]["id"]), books.now()
        expires_at = now + timedelta(seconds=c["grant"]["seconds"])
        grant: dict[str, Any] = {"tenant_id": self._tenant, "id": grant_id, "run_id": self._run}
        grant |= {name: c[name] for name in ("step_index", "attempt", "digest", "policy_digest", "fencing_token")}
        grant |= {"span_id": c["grant"]["span_id"], "state": "issued", "issued_at": now, "expires_at": expires_at}
        grant |= dict.fromkeys(("begun_at", "settled_at", "outcome", "outcome_digest"))
        books.grants.put(self._tenant, grant_id, grant)
        hold_reservations(books, self._tenant, grant_id, verdict["reserved"])
        use_approval(books, self._tenant, verdict)
        return {"grant_id": c["grant"]["id"], "span_id": c["grant"]["span_id"], "expires_at": json_time(expires_at)}

    def _park(self, verdict: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
        parked: dict[str, Any] = {"state": "awaiting_approval", "reason": "approval_required"}
        parked |= {"message": answer.get("message"), "updated_at": self._books.now()}
        self._books.run_states.change(self._tenant, self._run, lease_owner=None, lease_expires_at=None, **parked)
        return open_ticket(self._books, self._c) if verdict.get("opens") else {}

    def _append(self, state: str, verdict: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        names = ("step_id", "attempt", "capability", "resource", "digest", "policy_digest", "decision")
        payload = {name: self._c[name] for name in names}
        payload |= {"step": self._attempt[0], "reserved": verdict.get("reserved")}
        payload |= {"answer": {name: value for name, value in answer.items() if name != "replayed"}}
        kind = "approval_requested" if state == "awaiting_approval" else f"step_{state}"
        self._books.append(self._tenant, run_stream(self._run), kind, self._c["actor"], without_nulls(payload))
