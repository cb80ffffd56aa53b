"""``plm-cli events``: the record of what happened."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

import typer

from plm_engine_core.cli.exits import ExitCode
from plm_engine_core.cli.output import AsJson, show
from plm_engine_core.cli.storage import Books, with_books
from plm_engine_core.control_plane.events import Verification, verify_stream

app = typer.Typer(help="Check the record of what happened.", no_args_is_help=True)


@app.command("verify")
def verify(
    tenant_id: Annotated[UUID, typer.Option(help="Whose streams.")],
    stream: Annotated[str | None, typer.Option(help="Only this stream, such as run/<id>.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every hash chain of a tenant from its first event to its head, and name the first bad event.

    "Consistent" is what a database can say of itself; that nobody rewrote all of it needs a copy kept elsewhere.
    Status 0: consistent, 1: not, or the database refused; 2: wrong arguments; 3: no address.
    """
    results = with_books(lambda books: _verify(books, tenant_id, stream))
    answer = {"tenant_id": tenant_id, "consistent": all(each.consistent for each in results)}
    answer["streams"] = [_document(each) for each in results]
    show(answer, "\n".join(_line(each) for each in results) or "no events", as_json=as_json)
    if not answer["consistent"]:
        raise typer.Exit(int(ExitCode.FAILED))


async def _verify(books: Books, tenant_id: UUID, stream: str | None) -> list[Verification]:
    events = books.storage.events
    heads = [head for head in await events.heads(tenant_id) if stream in (None, head.stream)]
    return [await verify_stream(head, events.walk(tenant_id, head.stream)) for head in heads]


def _document(result: Verification) -> dict[str, Any]:
    return {
        "stream": result.stream,
        "events": result.events,
        "consistent": result.consistent,
        "first_bad_seq": result.first_bad_seq,
        "problem": result.problem or None,
    }


def _line(result: Verification) -> str:
    if result.consistent:
        return f"{result.stream}  {result.events} events  consistent"
    return f"{result.stream}  event {result.first_bad_seq} is bad: {result.problem}"
