"""Tickets inside an admission, and in time: what one means now, opening one, using one up, and time-outs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.policy.facts import calls_alike
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.values import json_time, text_at, text_time
from plm_engine_core.control_plane.vocabulary import PROVIDE_INPUT, Reason, RiskLevel, RunState

_RISKS = [risk.value for risk in RiskLevel]


def tickets_of(books: Books, tenant_id: UUID, run_id: UUID) -> list[Row]:
    """The tickets of a run."""
    return [row for row in books.approval_tickets.rows(tenant_id) if row["run_id"] == run_id]


def time_out_ticket(books: Books, ticket: Row, actor: str) -> Row:
    """Hand a ticket whose deadline passed on, once, or let it expire and its run go on; any other stays as it is."""
    tenant_id, run_id, now = ticket["tenant_id"], ticket["run_id"], books.now()
    if ticket["state"] != "pending" or ticket["deadline"] > now:
        return ticket
    if ticket["escalate_seconds"] is not None and ticket["escalated_at"] is None:
        deadline = now + timedelta(seconds=ticket["escalate_seconds"])
        left = books.approval_tickets.change(tenant_id, ticket["id"], escalated_at=now, deadline=deadline)
        kind = "approval_escalated"
    else:
        left = books.approval_tickets.change(tenant_id, ticket["id"], state="expired")
        books.queue_again(tenant_id, run_id, was=RunState.AWAITING_APPROVAL)
        kind = "approval_expired"
        if ticket["capability"] == PROVIDE_INPUT:
            message = f"nobody gave the input until {text_time(ticket['deadline'])}"
            end_ask(books, ticket, reason=Reason.INPUT_EXPIRED, message=message)
    payload = {**about(ticket), "deadline": json_time(left["deadline"])}
    books.append(tenant_id, run_stream(run_id), kind, actor, payload)
    return left


def time_out_tickets(books: Books, tenant_id: UUID, run_id: UUID, actor: str) -> bool:
    """Time the tickets of one run out; whether one expired, so that the caller delivers the run."""
    due = [row for row in tickets_of(books, tenant_id, run_id) if row["state"] == "pending"]
    due = [row for row in due if row["deadline"] <= books.now()]
    return "expired" in [time_out_ticket(books, ticket, actor)["state"] for ticket in due]


def end_ask(books: Books, ticket: Row, *, output: Any = None, reason: Reason | None = None, message: str = "") -> None:
    """End the step of an ask with its ticket: it succeeds with the input, or is refused for a reason."""
    group, place = (ticket["tenant_id"], ticket["run_id"]), (ticket["step_index"], ticket["attempt"])
    step = books.run_steps.get(group, place)
    if step is None or step["state"] != "awaiting_approval":
        return
    error = None
    if reason is not None:
        error = {"reason": reason.value, "message": message, "rule": step["decision"].get("rule"), "status": "denied"}
        error |= {"ticket_id": str(ticket["id"])}
    ended = {"state": "succeeded" if error is None else "denied", "evidence": "reported" if error is None else None}
    books.run_steps.change(group, place, **ended, output=output, error=error, finished_at=books.now())


def about(ticket: Row) -> dict[str, Any]:
    """How the events of a ticket name it."""
    return {"ticket_id": str(ticket["id"]), "step": ticket["step_index"], "attempt": ticket["attempt"]}


def approval_now(books: Books, c: Mapping[str, Any]) -> dict[str, Any]:
    """What a proposal that needs approval may do now, as what it changes of the verdict."""
    if c["ticket_id"] is None:
        scope = _standing_scope(books, c)
        return {"outcome": "allow", "approval_scope_id": str(scope["id"])} if scope is not None else {}
    ticket = books.approval_tickets.get(UUID(c["tenant_id"]), UUID(c["ticket_id"]))
    if ticket is None or ticket["run_id"] != UUID(c["run_id"]):
        return _refusal(None, "approval_mismatch", _MISMATCH)
    if not _is_for(ticket, c):
        return _refusal(ticket, "approval_mismatch", _MISMATCH)
    ticket = time_out_ticket(books, ticket, c["actor"])
    named, deadline = {"ticket_id": str(ticket["id"])}, ticket["deadline"]
    match ticket["state"]:
        case "denied":
            said = f": {ticket['comment']}" if ticket["comment"] else ""
            return _refusal(ticket, "approval_denied", f"denied by the approver{said}")
        case "cancelled":
            return _refusal(ticket, "approval_expired", "the approval ticket is cancelled")
        case state if state == "expired" or deadline <= books.now():
            return _refusal(ticket, "approval_expired", f"the approval was good until {text_time(deadline)}")
        case _ if not _stands(books, ticket, c):
            return _refusal(ticket, "approval_mismatch", _MISMATCH)
        case "approved":
            return {**named, "outcome": "allow"}
        case _:
            return {**named, "deadline": json_time(deadline)}


_MISMATCH = "the approval is for another call, another policy, or was already used"


def _is_for(ticket: Row, c: Mapping[str, Any]) -> bool:
    unused = ticket["consumed_at"] is None and ticket["superseded_by"] is None
    return unused and all(ticket[name] == c[name] for name in ("step_index", "digest"))


def _stands(books: Books, ticket: Row, c: Mapping[str, Any]) -> bool:
    """Whether a decision of a ticket counts under the policy and the definition of now."""
    return ticket["policy_digest"] == c["policy_digest"] and calls_alike(
        _asked_for(books, ticket), described_by(c["decision"])
    )


def _asked_for(books: Books, ticket: Row) -> Any:
    """The capability as the decision that opened a ticket describes it, by the event of the question."""
    for event in books.events.rows((ticket["tenant_id"], run_stream(ticket["run_id"]))):
        if event["kind"] == "approval_requested":
            payload = json.loads(event["payload"])
            if payload.get("answer", {}).get("ticket_id") == str(ticket["id"]):
                return described_by(payload.get("decision"))
    return None


def described_by(decision: Any) -> Any:
    """The capability of a recorded decision."""
    facts = decision.get("facts") if isinstance(decision, Mapping) else None
    return facts.get("capability") if isinstance(facts, Mapping) else None


def _refusal(ticket: Row | None, reason: str, message: str) -> dict[str, Any]:
    ticket_id = str(ticket["id"]) if ticket is not None else None
    unblock = "an approval of this very call, asked for anew"
    return {"outcome": "deny", "reason": reason, "message": message, "ticket_id": ticket_id, "unblock": unblock}


def _standing_scope(books: Books, c: Mapping[str, Any]) -> Row | None:
    """The approval scope that covers a proposal: everything it is bound to is the same, the risk is no higher."""
    tenant_id = UUID(c["tenant_id"])
    run = books.run_states.get(tenant_id, UUID(c["run_id"]))
    tier, risk = text_at(c["decision"], "tier"), text_at(c["decision"], "risk")
    if run is None or run["agent_id"] is None or risk not in _RISKS:
        return None
    bound = {"capability": c["capability"], "agent": run["agent_id"], "requested_by": UUID(c["requester"])}
    bound |= {"policy_digest": c["policy_digest"], "tier": tier}
    covering = [
        scope
        for scope in books.approval_scopes.rows(tenant_id)
        if all(scope[name] == value for name, value in bound.items())
        and scope["resource"] in (None, c["resource"])
        and _RISKS.index(risk) <= _RISKS.index(scope["risk"])
        and scope["revoked_at"] is None
        and scope["expires_at"] > books.now()
        and scope["used"] < scope["max_uses"]
        and calls_alike(_asked_for_by(books, scope), described_by(c["decision"]))
    ]
    return min(covering, key=lambda scope: (scope["expires_at"], scope["id"]), default=None)


def _asked_for_by(books: Books, scope: Row) -> Any:
    ticket = books.approval_tickets.get(scope["tenant_id"], scope["ticket_id"])
    return _asked_for(books, ticket) if ticket is not None else None


def open_ticket(books: Books, c: Mapping[str, Any]) -> dict[str, Any]:
    """Open the ticket of a step that has to ask; it takes the place of the one an earlier attempt opened."""
    tenant_id, run_id, new, now = UUID(c["tenant_id"]), UUID(c["run_id"]), UUID(c["ticket"]["id"]), books.now()
    deadline = now + timedelta(seconds=c["ticket"]["seconds"])
    earlier = [row for row in tickets_of(books, tenant_id, run_id) if row["step_index"] == c["step_index"]]
    earlier = [row for row in earlier if row["superseded_by"] is None]
    old = max(earlier, key=lambda row: row["attempt"], default=None)
    ticket: dict[str, Any] = {"tenant_id": tenant_id, "id": new, "run_id": run_id, "state": "pending"}
    names = ("step_index", "attempt", "capability", "resource", "arguments", "digest", "policy_digest")
    ticket |= {name: c[name] for name in names}
    ticket |= {name: text_at(c["decision"], name) for name in ("tier", "risk")}
    ticket |= {"requested_by": UUID(c["requester"]), "created_at": now, "deadline": deadline}
    escalate = c["ticket"]["escalate_seconds"]
    ticket |= {"escalate_seconds": float(escalate) if escalate is not None else None}
    ticket |= {"supersedes": old["id"] if old else None}
    ticket |= dict.fromkeys(("decided_at", "decided_by", "comment", "consumed_at", "escalated_at", "superseded_by"))
    books.approval_tickets.put(tenant_id, new, ticket)
    opened = {"ticket_id": str(new), "deadline": json_time(deadline)}
    if old is None:
        return opened
    state = "cancelled" if old["state"] == "pending" else old["state"]
    books.approval_tickets.change(tenant_id, old["id"], superseded_by=new, state=state)
    return {**opened, "supersedes": str(old["id"])}


def use_approval(books: Books, tenant_id: UUID, verdict: Mapping[str, Any]) -> None:
    """Use an approval up, in the transaction that grants what it allowed."""
    if verdict.get("ticket_id") is not None:
        books.approval_tickets.change(tenant_id, UUID(verdict["ticket_id"]), consumed_at=books.now())
    elif verdict.get("approval_scope_id") is not None:
        scope_id = UUID(verdict["approval_scope_id"])
        scope = books.approval_scopes.get(tenant_id, scope_id) or {"used": 0}
        books.approval_scopes.change(tenant_id, scope_id, used=scope["used"] + 1)
