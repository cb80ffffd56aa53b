"""``plm-cli approvals``: what waits for a human, and the human's word."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from plm_engine_core.cli.caller import Caller, PolicyFile, as_caller, policy_in_force, policy_of
from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, one_line, show
from plm_engine_core.cli.storage import Books
from plm_engine_core.control_plane.hitl import ApprovalGate, ApprovalTicket, ScopeTerms, ticket_revision
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.vocabulary import TicketDecision, TicketKind, TicketState

_MOST_READ = 1_000_000  # characters; the control plane takes far less

app = typer.Typer(help="Decide what waits for a human, as the bearer of PLM_TOKEN.", no_args_is_help=True)

TicketId = Annotated[UUID, typer.Argument(help="The ticket.", show_default=False)]
Comment = Annotated[str, typer.Option(help="What the agent and the record are told.")]
AsRead = Annotated[
    str | None, typer.Option(help="The revision that `show` told; refuse if somebody voted or said something since.")
]


@app.command("list")
def list_tickets(
    state: Annotated[TicketState | None, typer.Option(help="Only tickets in this state.")] = TicketState.PENDING,
    everything: Annotated[bool, typer.Option("--all", help="Tickets in any state.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List tickets of the tenant, the oldest first.

    Status 0: listed, even if there is none; 1: refused; 2: wrong arguments; 3: no address, or no usable token.
    """

    async def work(books: Books, caller: Caller) -> list[ApprovalTicket]:
        return list(
            await books.storage.approvals.list(
                caller.tenant_id, limit=limit, after=None, state=None if everything else state
            )
        )

    tickets = as_caller(work, as_json=as_json)
    lines = [
        f"{each.id}  {each.state.value:9}  until {each.deadline:%Y-%m-%d %H:%M:%S}  {_call(each)}" for each in tickets
    ]
    text = "\n".join(map(one_line, lines)) or "nothing waits"
    show({"items": [_document(each) for each in tickets]}, text, as_json=as_json)


@app.command("show")
def show_ticket(
    ticket_id: TicketId,
    policy: PolicyFile,
    wait: Annotated[float, typer.Option(min=0, max=3600, help="Wait so many seconds for its decision.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show one ticket: exactly what would be done, what its approval needs, and what was said.

    Waiting changes nothing of it. Status 0: shown; 1: refused; 2: wrong arguments; 3: no address, policy or token.
    """
    snapshot = policy_of(policy)

    async def work(books: Books, caller: Caller) -> dict[str, Any]:
        gate, store = await _gate(books, snapshot), books.storage.approvals
        ticket = await gate.wait(caller.tenant_id, ticket_id, seconds=wait)
        demand = gate.demand(ticket)
        votes = await store.votes(caller.tenant_id, ticket_id)
        comments = await store.comments(caller.tenant_id, ticket_id)
        return {
            **_document(ticket),
            "revision": ticket_revision(ticket, votes, comments),
            "needs": {"scopes": list(demand.scopes), "quorum": demand.quorum},
            "votes": [asdict(each) for each in votes],
            "comments": [asdict(each) for each in comments],
        }

    document = as_caller(work, as_json=as_json)
    show(document, _shown(document), as_json=as_json)


@app.command("approve")
def approve(
    ticket_id: TicketId,
    policy: PolicyFile,
    comment: Comment = "",
    scope_uses: Annotated[
        int | None, typer.Option(min=1, help="Offer an approval scope for so many further calls.")
    ] = None,
    scope_seconds: Annotated[float | None, typer.Option(min=0, help="How long the approval scope is to last.")] = None,
    scope_any_resource: Annotated[
        bool, typer.Option("--scope-any-resource", help="Let it cover other resources too.")
    ] = False,
    as_read: AsRead = None,
    as_json: AsJson = False,
) -> None:
    """Approve one ticket: this exact call only, unless an approval scope is offered.

    Status 0: counted; the ticket stays pending until its quorum is complete. 1: refused, and the sentence ends with the
    reason in brackets; 2: wrong arguments; 3: no address, policy or token.
    """
    if (scope_uses is None) != (scope_seconds is None):
        fail(ExitCode.USAGE, "--scope-uses and --scope-seconds go together")
    if scope_any_resource and scope_uses is None:
        fail(ExitCode.USAGE, "--scope-any-resource widens an approval scope; give --scope-uses and --scope-seconds too")
    scope = (
        ScopeTerms(uses=scope_uses, seconds=scope_seconds, any_resource=scope_any_resource)
        if scope_uses is not None and scope_seconds is not None
        else None
    )
    _decide(ticket_id, TicketDecision.APPROVE, policy_of(policy), comment, scope, as_read, as_json=as_json)


@app.command("deny")
def deny(
    ticket_id: TicketId, policy: PolicyFile, comment: Comment = "", as_read: AsRead = None, as_json: AsJson = False
) -> None:
    """Deny one ticket; one denial ends it.

    Status as for `approve`.
    """
    _decide(ticket_id, TicketDecision.DENY, policy_of(policy), comment, None, as_read, as_json=as_json)


@app.command("provide-input")
def provide_input(
    ticket_id: TicketId,
    policy: PolicyFile,
    value: Annotated[
        str | None, typer.Option("--input", help="The input as JSON; @FILE reads it, and without it standard input is.")
    ] = None,
    comment: Comment = "",
    as_read: AsRead = None,
    as_json: AsJson = False,
) -> None:
    """Give the input that one ticket asks for, as JSON; the first valid word ends it.

    It allows nothing, and the record keeps it: give no secrets. Status 0: given; 1: refused, and the sentence ends with
    the reason in brackets; 2: wrong arguments, or no JSON; 3: no address, policy or token.
    """
    snapshot, given = policy_of(policy), _json_of(value)

    async def work(books: Books, caller: Caller) -> ApprovalTicket:
        gate = await _gate(books, snapshot)
        return await gate.provide_input(
            caller.tenant_id, ticket_id, given, approver=caller.principal, comment=comment, as_read=as_read
        )

    ticket = as_caller(work, as_json=as_json)
    show(_document(ticket), f"ticket {ticket.id} is {ticket.state.value}", as_json=as_json)


@app.command("comment")
def comment_ticket(
    ticket_id: TicketId,
    body: Annotated[str, typer.Argument(help="What is to be said.", show_default=False)],
    policy: PolicyFile,
    as_json: AsJson = False,
) -> None:
    """Say something about a ticket; it decides nothing and stays.

    Status 0: kept; 1: refused; 2: wrong arguments; 3: no address, policy or token.
    """
    snapshot = policy_of(policy)

    async def work(books: Books, caller: Caller) -> dict[str, Any]:
        gate = await _gate(books, snapshot)
        return asdict(await gate.comment(caller.tenant_id, ticket_id, body, author=caller.principal))

    kept = as_caller(work, as_json=as_json)
    show(kept, f"comment {kept['id']} is kept", as_json=as_json)


@app.command("scopes")
def list_scopes(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50, as_json: AsJson = False
) -> None:
    """List approval scopes of the tenant, the oldest first, also those that are over.

    Status as for `list`.
    """

    async def work(books: Books, caller: Caller) -> list[dict[str, Any]]:
        found = await books.storage.approvals.scopes(caller.tenant_id, limit=limit, after=None)
        return [asdict(each) for each in found]

    scopes = as_caller(work, as_json=as_json)
    lines = [
        f"{each['id']}  {each['used']}/{each['max_uses']}  until {each['expires_at']:%Y-%m-%d %H:%M:%S}"
        f"{'  revoked' if each['revoked_at'] else ''}  {each['capability']} on {each['resource'] or 'any resource'}"
        for each in scopes
    ]
    show({"items": scopes}, "\n".join(map(one_line, lines)) or "there are none", as_json=as_json)


@app.command("revoke-scope")
def revoke_scope(
    scope_id: Annotated[UUID, typer.Argument(help="The approval scope.", show_default=False)],
    policy: PolicyFile,
    as_json: AsJson = False,
) -> None:
    """End an approval scope before its time.

    Status 0: it covers nothing more; 1: refused; 2: wrong arguments; 3: no address, policy or token.
    """
    snapshot = policy_of(policy)

    async def work(books: Books, caller: Caller) -> dict[str, Any]:
        gate = await _gate(books, snapshot)
        return asdict(await gate.revoke_scope(caller.tenant_id, scope_id, by=caller.principal))

    revoked = as_caller(work, as_json=as_json)
    show(revoked, f"approval scope {scope_id} is over", as_json=as_json)


def _decide(
    ticket_id: UUID,
    decision: TicketDecision,
    policy: PolicySnapshot,
    comment: str,
    scope: ScopeTerms | None,
    as_read: str | None,
    *,
    as_json: bool,
) -> None:
    async def work(books: Books, caller: Caller) -> ApprovalTicket:
        gate = await _gate(books, policy)
        return await gate.decide(
            caller.tenant_id,
            ticket_id,
            decision,
            approver=caller.principal,
            comment=comment,
            scope=scope,
            as_read=as_read,
        )

    ticket = as_caller(work, as_json=as_json)
    show(_document(ticket), f"ticket {ticket.id} is {ticket.state.value}", as_json=as_json)


def _json_of(value: str | None) -> Any:
    """The JSON value of an argument, of the file that it names, or of standard input; no message has a part of it."""
    try:
        if value is None:
            text = sys.stdin.read(_MOST_READ)
        elif value.startswith("@"):
            with Path(value[1:]).open(encoding="utf-8") as file:
                text = file.read(_MOST_READ)
        else:
            text = value
        return json.loads(text)
    except OSError as error:
        fail(ExitCode.USAGE, f"the input cannot be read from {value}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        fail(ExitCode.USAGE, f"the input is no JSON{where}; a text needs its quotation marks")


async def _gate(books: Books, file: PolicySnapshot) -> ApprovalGate:
    return ApprovalGate(store=books.storage.approvals, policy=await policy_in_force(books, file))


def _call(ticket: ApprovalTicket) -> str:
    if ticket.kind is TicketKind.INPUT:
        return f"input: {ticket.arguments.get('question', '')!s:.200}"
    return f"{ticket.capability} on {ticket.resource} ({ticket.risk} risk)"


def _document(ticket: ApprovalTicket) -> dict[str, Any]:
    return {"kind": ticket.kind.value} | {key: value for key, value in asdict(ticket).items() if key != "tenant_id"}


def _shown(document: dict[str, Any]) -> str:
    asks = document["kind"] == TicketKind.INPUT
    call = () if asks else ("capability", "resource", "arguments", "tier", "risk")
    names = ("kind", "state", *call, "requested_by", "deadline", "decided_by")
    lines = [f"{name}: {document[name]}" for name in names if document[name] is not None]
    if asks:
        lines += [f"{name}: {_text(value)}" for name, value in sorted(document["arguments"].items())]
    if asks and document["state"] == TicketState.APPROVED:
        lines.append(f"input: {_text(document['input'])}")
    needs = document["needs"]
    lines.append(f"needs: {needs['quorum']} with {' and '.join(needs['scopes'])}")
    lines += [f"{each['voter']} says {each['vote']}: {each['comment'] or '-'}" for each in document["votes"]]
    lines += [f"{each['author']}: {each['body']}" for each in document["comments"]]
    lines.append(f"revision: {document['revision']}")
    return "\n".join(map(one_line, lines))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
