"""One ask, as `engine_ask_v1` books it: parks the run on a ticket, or refuses the attempt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import IdempotencyConflict
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.storage.memory.admit import BEING_CANCELLED, policy_changed
from plm_engine_core.control_plane.storage.memory.books import Books, Row, halted
from plm_engine_core.control_plane.storage.memory.tickets import open_ticket, tickets_of
from plm_engine_core.control_plane.storage.memory.values import json_time
from plm_engine_core.control_plane.vocabulary import PROVIDE_INPUT

_TOLD = ("reason", "message", "rule", "unblock")


def book_ask(books: Books, c: Mapping[str, Any]) -> dict[str, Any]:
    """The answer, after everything it says was written; `c` is `ask_json` as it is kept."""
    tenant_id, run_id, place = UUID(c["tenant_id"]), UUID(c["run_id"]), (c["step_index"], c["attempt"])
    step = books.run_steps.get((tenant_id, run_id), place)
    if step is not None:
        return _asked(books, c, step)
    run = books.hold_run(tenant_id, run_id, c["fencing_token"], live=True)
    active = books.active_policy()
    if active is not None and active != c["policy_digest"]:
        return policy_changed(c["policy_digest"], active)
    halt = books.standing_halt(tenant_id, run_id)
    if halt is not None or run["cancel_requested_at"] is not None:
        refusal = halted(halt) if halt is not None else BEING_CANCELLED
        return {**{name: refusal[name] for name in _TOLD}, "status": "denied"}

    verdict, parked = c["decision"], c["decision"]["outcome"] == "ask"
    earlier = [row for row in tickets_of(books, tenant_id, run_id) if row["capability"] == PROVIDE_INPUT]
    if parked and len(earlier) >= c["most"]:
        verdict, parked = c["beyond"], False
    answer = {name: verdict[name] for name in _TOLD} | {"status": "pending" if parked else "denied"}
    answer |= {"ticket_id": c["ticket"]["id"]} if parked else {}
    _write_step(books, {**c, "decision": verdict}, answer, parked=parked)
    if parked:
        answer |= open_ticket(books, {**c, "decision": verdict})
        left = {"state": "awaiting_approval", "reason": verdict["reason"], "message": verdict["message"]}
        free = {"lease_owner": None, "lease_expires_at": None, "updated_at": books.now()}
        books.run_states.change(tenant_id, run_id, **left, **free)
    payload = {name: c[name] for name in ("step_id", "attempt", "capability", "resource", "digest", "policy_digest")}
    payload |= {"step": c["step_index"], "decision": verdict, "answer": answer, "ticket_kind": "input"}
    payload |= {name: c["arguments"][name] for name in ("question", "schema")}
    if parked and "escalates" in verdict:
        raised = {**verdict["escalates"], "ticket_id": c["ticket"]["id"]}
        books.append(tenant_id, run_stream(run_id), "escalation_raised", c["actor"], raised)
    kind = "approval_requested" if parked else "step_denied"
    books.append(tenant_id, run_stream(run_id), kind, c["actor"], payload)
    return {**answer, "replayed": False}


def _write_step(books: Books, c: Mapping[str, Any], answer: Mapping[str, Any], *, parked: bool) -> None:
    tenant_id, run_id = UUID(c["tenant_id"]), UUID(c["run_id"])
    names = ("step_index", "attempt", "step_id", "step_key", "capability", "resource", "arguments", "decision")
    step: dict[str, Any] = {"tenant_id": tenant_id, "run_id": run_id, "created_at": books.now()}
    step |= {name: c[name] for name in (*names, "executor_kind")} | {"arguments_digest": c["digest"]}
    step |= {"state": "awaiting_approval" if parked else "denied", "error": None if parked else dict(answer)}
    step |= {"ticket_id": UUID(answer["ticket_id"]) if parked else None}
    step |= dict.fromkeys(("grant_id", "evidence", "output", "usage", "started_at", "finished_at"))
    books.run_steps.put((tenant_id, run_id), (c["step_index"], c["attempt"]), step)


def _asked(books: Books, c: Mapping[str, Any], step: Row) -> dict[str, Any]:
    """What an ask was answered with when it was booked."""
    same = {"capability": c["capability"], "arguments_digest": c["digest"], "step_id": c["step_id"]}
    if any(step[name] != value for name, value in same.items()):
        place = f"attempt {step['attempt']} of step {step['step_index']} of run {step['run_id']}"
        raise IdempotencyConflict(f"{place} was already used for something else")
    if step["ticket_id"] is None:
        return {**step["error"], "replayed": True}
    ticket = books.approval_tickets.get(step["tenant_id"], step["ticket_id"]) or {}
    told = {name: step["decision"][name] for name in _TOLD} | {"status": "pending", "replayed": True}
    return {**told, "ticket_id": str(step["ticket_id"]), "deadline": json_time(ticket["deadline"])}
