"""Approval tickets, votes, comments and approval scopes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM, run_stream
from plm_engine_core.control_plane.hitl.ticket import ApprovalScope, ApprovalTicket, Comment, Vote, revision
from plm_engine_core.control_plane.storage.commands import ask_json, input_json, vote_json
from plm_engine_core.control_plane.storage.memory.asks import book_ask
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.tickets import about, end_ask, time_out_ticket
from plm_engine_core.control_plane.storage.memory.values import (
    fresh,
    json_text,
    json_time,
    kept_json,
    storable_text,
    text_time,
    without_nulls,
)
from plm_engine_core.control_plane.storage.ports import AskCommand, InputCommand, VoteCommand
from plm_engine_core.control_plane.storage.rows import comment_row, scope_row, ticket_row, vote_row
from plm_engine_core.control_plane.vocabulary import PROVIDE_INPUT, Reason, RunState, TicketState


class MemoryApprovals:
    """Tickets in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def get(self, tenant_id: UUID, ticket_id: UUID) -> ApprovalTicket:
        """One ticket."""
        async with self._books.turn() as books:
            return _read(books, _ticket(books, tenant_id, ticket_id))

    async def list(
        self, tenant_id: UUID, *, limit: int, after: tuple[datetime, UUID] | None, state: TicketState | None
    ) -> Sequence[ApprovalTicket]:
        """Oldest first."""
        async with self._books.turn() as books:
            rows = books.approval_tickets.rows(tenant_id)
            page = _page([row for row in rows if state is None or row["state"] == state.value], after, limit)
            return [_read(books, row) for row in page]

    async def votes(self, tenant_id: UUID, ticket_id: UUID) -> Sequence[Vote]:
        """The first one first."""
        async with self._books.turn() as books:
            rows = books.approval_votes.rows((tenant_id, ticket_id))
            return [vote_row(row) for row in sorted(rows, key=lambda row: (row["voted_at"], row["voter"]))]

    async def decide(self, command: VoteCommand) -> Mapping[str, Any]:
        """Count one vote, and enqueue the parked run in the same transaction."""
        vote = kept_json(vote_json(command), root="vote")
        async with self._books.turn() as books:
            ticket = _ticket(books, command.tenant_id, command.ticket_id)
            answer = _decide(books, ticket, vote, command.voter)
            if answer["deliver"]:
                books.deliver(command.tenant_id, ticket["run_id"])
            return answer

    async def ask(self, command: AskCommand) -> Mapping[str, Any]:
        """Book an ask, once."""
        booking = kept_json(ask_json(command), root="ask")
        async with self._books.turn() as books:
            return book_ask(books, booking)

    async def provide_input(self, command: InputCommand) -> Mapping[str, Any]:
        """Take an input, and enqueue the parked run in the same transaction."""
        given = kept_json(input_json(command), root="input")
        async with self._books.turn() as books:
            ticket = _ticket(books, command.tenant_id, command.ticket_id)
            answer = _provide(books, ticket, given, command.voter)
            if answer["deliver"]:
                books.deliver(command.tenant_id, ticket["run_id"])
            return answer

    async def comments(self, tenant_id: UUID, ticket_id: UUID) -> Sequence[Comment]:
        """The first one first."""
        async with self._books.turn() as books:
            return [
                comment_row(row) for row in sorted(books.approval_comments.rows((tenant_id, ticket_id)), key=_place)
            ]

    async def comment(
        self, tenant_id: UUID, ticket_id: UUID, comment_id: UUID, *, body: str, author: UUID, actor: str
    ) -> Comment:
        """Add a comment, with its event."""
        async with self._books.turn() as books:
            storable_text(body)
            ticket = _ticket(books, tenant_id, ticket_id)
            row = {"id": comment_id, "ticket_id": ticket_id, "author": author, "body": body, "created_at": books.now()}
            books.approval_comments.put((tenant_id, ticket_id), comment_id, row)
            payload = {"ticket_id": str(ticket_id), "comment_id": str(comment_id), "body": body}
            books.append(tenant_id, run_stream(ticket["run_id"]), "approval_commented", actor, payload)
            return comment_row(row)

    async def scopes(
        self, tenant_id: UUID, *, limit: int, after: tuple[datetime, UUID] | None
    ) -> Sequence[ApprovalScope]:
        """Oldest first."""
        async with self._books.turn() as books:
            return [scope_row(row) for row in _page(books.approval_scopes.rows(tenant_id), after, limit)]

    async def revoke_scope(self, tenant_id: UUID, scope_id: UUID, *, by: UUID, actor: str) -> ApprovalScope:
        """End an approval scope, with its event; ending it twice answers the same."""
        async with self._books.turn() as books:
            scope = books.approval_scopes.get(tenant_id, scope_id)
            if scope is None:
                raise NotFound("approval scope", scope_id)
            if scope["revoked_at"] is None:
                scope = books.approval_scopes.change(tenant_id, scope_id, revoked_at=books.now(), revoked_by=by)
                payload = {"scope_id": str(scope_id), "capability": scope["capability"], "used": scope["used"]}
                books.append(tenant_id, TENANT_STREAM, "approval_scope_revoked", actor, payload)
            return scope_row(scope)


_NOT_YOUR_CALL = "the requester of a call cannot decide its approval, nor can who had it requested"
_NOT_YOUR_ASK = "the policy has the requester of a run answer none of its asks, nor who had it requested"


def _decide(books: Books, ticket: Row, vote: Mapping[str, Any], voter: UUID) -> dict[str, Any]:
    """Count one vote: a denial ends the ticket, and so do `quorum` approvals by different people in time."""
    known = books.approval_votes.get((ticket["tenant_id"], ticket["id"]), voter)
    named = {"run_id": str(ticket["run_id"])}
    same = known if known is not None and known["vote"] == vote["vote"] else None
    if same is not None and (ticket["state"] != "pending" or _has_authority(same, vote)):
        status = "counted" if ticket["state"] == "pending" else "decided"
        return {**named, "status": status, "replayed": True, "deliver": False}
    was, ticket = ticket["state"], time_out_ticket(books, ticket, vote["actor"])
    refusal = _refused_vote(books, ticket, vote, voter)
    if refusal is not None:
        expired = was == "pending" and ticket["state"] == "expired"
        return {**named, **refusal, "status": "refused", "deliver": expired}
    state = _count(books, ticket, vote, voter)
    status = "counted" if state is None else "decided"
    return {**named, "status": status, "replayed": False, "deliver": state is not None}


def _provide(books: Books, ticket: Row, given: Mapping[str, Any], voter: UUID) -> dict[str, Any]:
    """Take an input: the first valid word ends the ticket and its step, and the run goes on."""
    tenant_id, named = ticket["tenant_id"], {"run_id": str(ticket["run_id"])}
    if ticket["decided_by"] == voter and ticket["state"] == "approved":
        step = books.run_steps.get((tenant_id, ticket["run_id"]), (ticket["step_index"], ticket["attempt"]))
        if step is not None and json_text(step["output"]) == json_text(given["input"]):
            return {**named, "status": "decided", "replayed": True, "deliver": False}
    was, ticket = ticket["state"], time_out_ticket(books, ticket, given["actor"])
    refusal = _refused_vote(books, ticket, given, voter)
    if refusal is not None:
        expired = was == "pending" and ticket["state"] == "expired"
        return {**named, **refusal, "status": "refused", "deliver": expired}
    decided = {"state": "approved", "decided_at": books.now(), "decided_by": voter, "comment": given["comment"]}
    books.approval_tickets.change(tenant_id, ticket["id"], **decided)
    end_ask(books, ticket, output=given["input"])
    books.queue_again(tenant_id, ticket["run_id"], was=RunState.AWAITING_APPROVAL)
    payload = {**about(ticket), **{name: given[name] for name in ("vote", "authority", "input")}}
    payload |= {"decision": "approved", "digest": ticket["digest"], "ticket_kind": "input"}
    payload |= {"comment": given["comment"]} if given["comment"] else {}
    books.append(tenant_id, run_stream(ticket["run_id"]), "approval_decided", given["actor"], payload)
    return {**named, "status": "decided", "replayed": False, "deliver": True}


def _revision(books: Books, ticket: Row) -> str:
    group = ticket["tenant_id"], ticket["id"]
    votes, comments = books.approval_votes.rows(group), books.approval_comments.rows(group)
    return revision(
        ticket["state"], ticket["escalated_at"], [vote["voted_at"] for vote in votes], comments=len(list(comments))
    )


def _refused_vote(books: Books, ticket: Row, vote: Mapping[str, Any], voter: UUID) -> dict[str, str] | None:
    """Why a voter cannot be counted; nobody decides what they asked for themselves, or had asked for by delegation."""
    principal = books.run(ticket["tenant_id"], ticket["run_id"])["principal"]
    known = books.approval_votes.get((ticket["tenant_id"], ticket["id"]), voter)
    asks = ticket["capability"] == PROVIDE_INPUT
    now = _revision(books, ticket)
    theirs = ticket["requested_by"] == voter or str(voter) in principal.get("delegated_by", ())
    if asks and vote["vote"] == "approve":
        refusal = "ticket_kind", "the ticket asks for an input: give it with provide_input, or deny it"
    elif not asks and vote["vote"] == PROVIDE_INPUT:
        refusal = "ticket_kind", "the ticket asks for an approval: approve or deny it"
    elif theirs and not (asks and vote["requester_may"]):
        refusal = "separation_of_duties", _NOT_YOUR_ASK if asks else _NOT_YOUR_CALL
    elif ticket["state"] == "expired":
        passed, what = text_time(ticket["deadline"]), "ask" if asks else "call"
        refusal = "approval_expired", f"the deadline {passed} has passed; the {what} is denied"
    elif ticket["state"] != "pending":
        refusal = "already_decided", f"the ticket is already {ticket['state']}"
    elif (ticket["escalated_at"] is not None) != vote["escalated"]:
        handed_on = "the ticket was handed on meanwhile; whoever decides it now needs another OAuth scope"
        refusal = "escalated", handed_on
    elif known is not None and known["vote"] != vote["vote"]:
        refusal = "already_voted", "you have voted on this ticket before, the other way; a vote is given once"
    elif vote.get("as_read", now) != now:
        refusal = "changed_meanwhile", "the ticket was voted or commented on, or handed on, since it was read"
    else:
        return None
    return {"reason": refusal[0], "message": refusal[1]}


def _count(books: Books, ticket: Row, vote: Mapping[str, Any], voter: UUID) -> str | None:
    """Write a vote down, and what it makes of the ticket: its new state, or None where more are needed."""
    tenant_id, group, now = ticket["tenant_id"], (ticket["tenant_id"], ticket["id"]), books.now()
    offered = vote["scope"] or dict.fromkeys(("uses", "seconds", "any_resource"))
    row = {name: vote[name] for name in ("vote", "comment", "authority")}
    row |= {"ticket_id": ticket["id"], "voter": voter, "voted_at": now}
    seconds = offered["seconds"]
    row |= {"scope_uses": offered["uses"], "scope_any_resource": offered["any_resource"]}
    row |= {"scope_seconds": float(seconds) if seconds is not None else None}
    books.approval_votes.put(group, voter, row)
    approvals = [each for each in books.approval_votes.rows(group) if each["vote"] == "approve"]
    votes = sum(_has_authority(each, vote) for each in approvals)
    approved = "approved" if votes >= vote["quorum"] else None
    state = "denied" if vote["vote"] == "deny" else approved
    scope = None
    if state is not None:
        decided = {"state": state, "decided_at": now, "decided_by": voter, "comment": vote["comment"]}
        books.approval_tickets.change(tenant_id, ticket["id"], **decided)
        books.queue_again(tenant_id, ticket["run_id"], was=RunState.AWAITING_APPROVAL)
    asks = ticket["capability"] == PROVIDE_INPUT
    if state == "denied" and asks:
        said = f": {vote['comment']}" if vote["comment"] else ""
        end_ask(books, ticket, reason=Reason.INPUT_DENIED, message=f"no input was given{said}")
    elif state == "approved":
        scope = _leave_scope(books, ticket, approvals, voter, UUID(vote["scope_id"]))
    payload = {**about(ticket), "vote": vote["vote"], "votes": votes, "quorum": vote["quorum"]}
    payload |= {"authority": vote["authority"], "decision": state, "digest": ticket["digest"], "scope": scope}
    payload |= {"comment": vote["comment"] or None, "ticket_kind": "input" if asks else None}
    kind = "approval_voted" if state is None else "approval_decided"
    books.append(tenant_id, run_stream(ticket["run_id"]), kind, vote["actor"], without_nulls(payload))
    return state


def _has_authority(given: Row, vote: Mapping[str, Any]) -> bool:
    """Whether a vote was given with the authority that another one, on the same ticket, is asked for now."""
    return set(vote["authority"]) <= set(given["authority"])


def _leave_scope(
    books: Books, ticket: Row, approvals: Sequence[Row], by: UUID, scope_id: UUID
) -> dict[str, Any] | None:
    """Leave an approval scope behind where every approver offered one: the narrowest of their terms."""
    agent = books.run(ticket["tenant_id"], ticket["run_id"])["agent_id"]
    if not agent or any(vote["scope_uses"] is None for vote in approvals):
        return None
    now = books.now()
    scope = {
        name: ticket[name] for name in ("tenant_id", "capability", "requested_by", "policy_digest", "tier", "risk")
    }
    scope |= {"id": scope_id, "ticket_id": ticket["id"], "agent": agent, "granted_by": by, "used": 0}
    scope |= {"resource": None if all(vote["scope_any_resource"] for vote in approvals) else ticket["resource"]}
    scope |= {"max_uses": min(vote["scope_uses"] for vote in approvals)}
    scope |= {"expires_at": now + timedelta(seconds=min(vote["scope_seconds"] for vote in approvals))}
    books.approval_scopes.put(
        ticket["tenant_id"], scope_id, {**scope, "created_at": now, "revoked_at": None, "revoked_by": None}
    )
    left = {"id": str(scope_id), "uses": scope["max_uses"], "expires_at": json_time(scope["expires_at"])}
    return {**left, "resource": scope["resource"]}


def _ticket(books: Books, tenant_id: UUID, ticket_id: UUID) -> Row:
    ticket = books.approval_tickets.get(tenant_id, ticket_id)
    if ticket is None:
        raise NotFound("approval ticket", ticket_id)
    return ticket


def _read(books: Books, row: Row) -> ApprovalTicket:
    """A ticket, an ask with the input that was given: it is the output of the step that asked."""
    place = (row["step_index"], row["attempt"])
    step = books.run_steps.get((row["tenant_id"], row["run_id"]), place) if row["capability"] == PROVIDE_INPUT else None
    return ticket_row(fresh({**row, "input": step["output"] if step is not None else None}))


def _page(rows: Sequence[Row], after: tuple[datetime, UUID] | None, limit: int) -> list[Row]:
    return sorted((row for row in rows if after is None or _place(row) > after), key=_place)[:limit]


def _place(row: Row) -> tuple[datetime, UUID]:
    return row["created_at"], row["id"]
