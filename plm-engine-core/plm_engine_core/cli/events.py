"""``plm-cli events``: the record of what happened, checked, signed and exported."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from uuid import UUID

import typer

from plm_engine_core.cli.event_archive import app as archive_app
from plm_engine_core.cli.event_archive import read_archive
from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, one_line, show
from plm_engine_core.cli.storage import Books, as_platform, with_books
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events import (
    BEGINNING,
    Checkpoint,
    Exported,
    FeedCursor,
    FeedPage,
    PublicKeys,
    RunAsOf,
    Signer,
    Verification,
    as_of,
    export,
    load_public_keys,
    load_signer,
    read_exports,
    rebuild,
    verify_tenant,
)
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.events.export import lines_of
from plm_engine_core.control_plane.events.signing import new_private_pem

app = typer.Typer(help="Check, sign and export the record of what happened.", no_args_is_help=True)

app.add_typer(archive_app, name="archive")

_FOLLOW_SECONDS = 1.0

TenantId = Annotated[UUID, typer.Option(help="Whose streams.")]
Exports = Annotated[list[Path] | None, typer.Option("--export", help="An export of this tenant; repeat, in order.")]
Believed = Annotated[
    list[Path] | None, typer.Option("--public-key", help="A key whose signatures are believed (PEM); repeat.")
]
Key = Annotated[Path, typer.Option(envvar="PLM_EVENTS_KEY", help="The private key that signs (PEM, mode 0600).")]


@app.command("verify")
def verify(
    tenant_id: TenantId,
    stream: Annotated[str | None, typer.Option(help="Only this stream, such as run/<id>.")] = None,
    exports: Exports = None,
    archive: Annotated[
        str | None, typer.Option(help="An archive that holds this tenant's exports: a folder or s3://bucket.")
    ] = None,
    public_key: Believed = None,
    since_checkpoint: Annotated[
        bool, typer.Option(help="Take what the newest signed checkpoint covers as good; needs --public-key.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every hash chain of a tenant from its first event to its head, and name the first bad event.

    "Consistent" is what a database can say of itself. With exports that were kept elsewhere, and the public key, it is
    "unforged" as far as they go: nobody has changed, cut off or removed what they hold.
    Status 0: good, 1: not, no event of a stream that is named, or the database refused; 2: wrong arguments; 3: no
    address.
    """
    if exports and archive:
        fail(ExitCode.USAGE, "name exports or an archive, not both")
    if (exports or archive or since_checkpoint) and not public_key:
        fail(ExitCode.USAGE, "signatures need a key to be checked with: name it with --public-key")
    if public_key and not (exports or archive or since_checkpoint):
        fail(ExitCode.USAGE, "--public-key is for --export, --archive or --since-checkpoint; nothing else is signed")
    if (exports or archive) and since_checkpoint:
        fail(ExitCode.USAGE, "against an export everything is checked; leave out --since-checkpoint")
    keys = _believed(public_key)
    exported = _read(exports, keys) if exports else read_archive(archive, tenant_id, keys) if archive else None
    if exported is not None and exported.tenant_id != tenant_id:
        fail(ExitCode.USAGE, f"the export is of tenant {exported.tenant_id}, not of {tenant_id}")
    results = with_books(
        lambda books: verify_tenant(
            books.storage,
            tenant_id,
            stream=stream,
            exported=exported,
            trusted=keys if since_checkpoint else None,
        ),
        of=tenant_id,
        as_json=as_json,
    )
    consistent = all(each.consistent for each in results)
    answer = {
        "tenant_id": tenant_id,
        "consistent": consistent,
        "unforged_up_to_checkpoint": exported.newest.number if consistent and exported and exported.newest else None,
        "streams": [_document(each) for each in results],
    }
    show(answer, "\n".join(_line(each, exported) for each in results) or "no events", as_json=as_json)
    if not consistent or (stream is not None and not results):
        raise typer.Exit(int(ExitCode.FAILED))


@app.command("verify-export")
def verify_export(
    files: Annotated[list[Path], typer.Argument(help="Exports of one tenant, in order.")],
    public_key: Believed = None,
    as_json: AsJson = False,
) -> None:
    """Check exports alone, without a database: every event, every checkpoint and every signature.

    Status 0: unforged, 1: not; 2: wrong arguments.
    """
    if not public_key:
        fail(ExitCode.USAGE, "signatures need a key to be checked with: name it with --public-key")
    found = _read(files, _believed(public_key))
    newest = found.newest
    answer = {
        "tenant_id": found.tenant_id,
        "unforged": found.unforged,
        "checkpoint": newest.number if newest else None,
        "taken_at": newest.taken_at.isoformat() if newest else None,
        "streams": len(found.heads),
        "events": found.events,
    }
    show(
        answer,
        f"unforged: {found.events} events in {len(found.heads)} streams, up to checkpoint {answer['checkpoint']} "
        f"of {answer['taken_at']}",
        as_json=as_json,
    )


@app.command("export")
def export_command(
    tenant_id: TenantId,
    to: Annotated[Path, typer.Option(help="The file to write; it must not exist yet.")],
    after: Annotated[int, typer.Option(min=0, help="Go on after this checkpoint, where an export ended.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write events and signed checkpoints to a file, to be kept where the database's masters cannot reach.

    Status 0: written, 1: not; 3: no address.
    """
    with _new_file(to) as file:
        newest = with_books(
            lambda books: export(books.storage.checkpoints, tenant_id, file, after=after),
            of=tenant_id,
            as_json=as_json,
        )
        if newest == after:
            fail(ExitCode.FAILED, f"there is no checkpoint after {after}; `plm-cli events checkpoint` takes one")
    answer = {"tenant_id": tenant_id, "file": to, "checkpoint": newest}
    show(answer, f"{to} holds everything after checkpoint {after} up to checkpoint {newest}", as_json=as_json)


@app.command("feed")
def feed(
    tenant_id: TenantId,
    after: Annotated[str, typer.Option(help="Go on after this cursor, where a page ended.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Events a page.")] = 100,
    follow: Annotated[bool, typer.Option(help="Go on with page after page, and wait for more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the events of all streams of a tenant, none left out, with the cursor to go on after them.

    With --json each page is one line. Status 0: shown, 1: the database refused; 2: wrong arguments; 3: no address.
    """
    try:
        cursor = FeedCursor.decode(after) if after else BEGINNING
    except InvalidRequest as error:
        fail(ExitCode.USAGE, str(error))

    async def pages(books: Books) -> None:
        nonlocal cursor
        while True:
            page = await books.storage.events.feed(tenant_id, after=cursor, limit=limit)
            if page.events or not follow:
                _show_page(page, as_json=as_json)
            cursor = page.cursor
            if not follow:
                return
            if len(page.events) < limit:
                await asyncio.sleep(_FOLLOW_SECONDS)

    with suppress(KeyboardInterrupt):
        with_books(pages, of=tenant_id, as_json=as_json)


@app.command("rebuild")
def rebuild_command(tenant_id: TenantId, as_json: AsJson = False) -> None:
    """Rebuild every run, ticket and budget of a tenant from its events alone, and compare with the tables.

    Status 0: they agree, 1: they do not, or the database refused; 3: no address.
    """
    folded, found = with_books(lambda books: rebuild(books.storage, tenant_id), of=tenant_id, as_json=as_json)
    answer = {
        "tenant_id": tenant_id,
        "runs": len(folded.runs),
        "tickets": len(folded.tickets),
        "budgets": len(folded.budgets),
        "differences": [{"what": each.what, "events": str(each.events), "table": str(each.table)} for each in found],
    }
    lines = [f"{each.what}: events say {each.events}, the table says {each.table}" for each in found]
    counts = ", ".join(f"{answer[name]} {name}" for name in ("runs", "tickets", "budgets"))
    show(answer, "\n".join(lines) or f"events and tables agree: {counts}", as_json=as_json)
    if found:
        raise typer.Exit(int(ExitCode.FAILED))


@app.command("as-of")
def as_of_command(
    run_id: Annotated[UUID, typer.Argument(help="A run.")],
    moment: Annotated[
        str,
        typer.Argument(help="A time with its zone, as 2030-01-31T12:00:00Z, or the sequence of an event of the run."),
    ],
    tenant_id: Annotated[UUID, typer.Option(help="Whose run.")],
    as_json: AsJson = False,
) -> None:
    """Show a run, its tickets and its own budgets as they were at a moment, from its events alone.

    Status 0: shown, 1: no such run or moment, what would tell it was pruned, or the database refused; 2: wrong
    arguments; 3: no address.
    """
    when = _moment(moment)
    found = with_books(lambda books: as_of(books.storage, tenant_id, run_id, when), of=tenant_id, as_json=as_json)
    show(_run_document(found), "\n".join(map(one_line, _run_lines(found))), as_json=as_json)


@app.command("checkpoint")
def checkpoint(tenant_id: TenantId, key: Key, as_json: AsJson = False) -> None:
    """Sign the heads of a tenant's streams now, as `serve` and `worker` do every minute.

    Status 0: done, or nothing had changed; 1: not; 2: wrong arguments; 3: no address, or the key cannot be used.
    """
    signer = _signer(key)
    taken = as_platform(
        lambda books: Checkpointer(books.storage.checkpoints, signer).take(tenant_id), of=tenant_id, as_json=as_json
    )
    answer: dict[str, Any] = {"tenant_id": tenant_id, "checkpoint": taken.number if taken else None}
    show(answer, _taken(taken), as_json=as_json)


@app.command("new-key")
def new_key(to: Annotated[Path, typer.Option(help="The file for the private key; it must not exist yet.")]) -> None:
    """Make a key that signs checkpoints, and print its public half, to be kept by those who check.

    After a rotation the old public keys are still needed for the old checkpoints. Status 0: done, 1: not.
    """
    try:
        with os.fdopen(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(new_private_pem())
    except OSError as error:
        fail(ExitCode.FAILED, f"{to} cannot be made: {error.strerror}")
    typer.echo(_signer(to).public_pem, nl=False)


@app.command("public-key")
def public_key_of(key: Key) -> None:
    """Print the public half of a key. Status 0: done, 3: the key cannot be used."""
    typer.echo(_signer(key).public_pem, nl=False)


def _moment(text: str) -> datetime | int:
    try:
        return int(text) if text.isdecimal() else datetime.fromisoformat(text)
    except ValueError:
        fail(ExitCode.USAGE, f"{text!r:.80} is neither a time nor the sequence of an event")


def _run_document(found: RunAsOf) -> dict[str, Any]:
    return {
        "run_id": found.run_id,
        "seq": found.seq,
        "at": found.at.isoformat(),
        "run": vars(found.run),
        "tickets": [{"id": ticket_id, **vars(ticket)} for ticket_id, ticket in found.tickets.items()],
        "budgets": [
            {"unit": key.unit, "period": key.period, "starts_at": key.starts_at.isoformat(), **vars(budget)}
            for key, budget in found.budgets.items()
        ],
    }


def _run_lines(found: RunAsOf) -> Iterator[str]:
    reason = f" ({found.run.reason})" if found.run.reason else ""
    yield f"run {found.run_id} at event {found.seq}, {found.at.isoformat()}: {found.run.state}{reason}"
    if found.run.message:
        yield f"  {found.run.message}"
    for ticket_id, ticket in found.tickets.items():
        state = "used" if ticket.consumed else ticket.state
        yield f"  ticket {ticket_id}: {state}, {ticket.capability} on {ticket.resource}"
    for key, budget in found.budgets.items():
        yield f"  budget in {key.unit}: {budget.spent.normalize():f} spent, {budget.reserved.normalize():f} reserved"


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is whole on the disk after the block, or not there."""
    try:
        with path.open("xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink()
                raise
    except OSError as error:
        fail(ExitCode.FAILED, f"{path} cannot be written: {error.strerror}")


def _read(files: list[Path], keys: PublicKeys) -> Exported:
    with ExitStack() as stack:
        try:
            found = read_exports([lines_of(stack.enter_context(path.open("rb"))) for path in files], keys)
        except OSError as error:
            fail(ExitCode.USAGE, f"{error.filename} cannot be read: {error.strerror}")
    if found.problem:
        fail(ExitCode.FAILED, f"the export is not what was signed: {found.problem}")
    return found


def _believed(paths: list[Path] | None) -> PublicKeys:
    try:
        return load_public_keys(paths or [])
    except InvalidRequest as error:
        fail(ExitCode.USAGE, str(error))


def _signer(path: Path) -> Signer:
    try:
        return load_signer(path)
    except InvalidRequest as error:
        fail(ExitCode.NOT_CONFIGURED, str(error))


def _show_page(page: FeedPage, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_page_document(page)))
        return
    for event in page.events:
        typer.echo(f"{event.occurred_at.isoformat()}  {event.stream}  {event.seq}  {event.kind}  {event.actor}")
    if page.held_back is not None:
        by = f"server process {page.held_back.blocking_pid}" if page.held_back.blocking_pid else "a transaction"
        typer.echo(
            f"{page.held_back.events} more since {page.held_back.since.isoformat()} wait for {by} to end", err=True
        )
    typer.echo(f"cursor {page.cursor.encode()}", err=True)


def _page_document(page: FeedPage) -> dict[str, Any]:
    held_back = page.held_back
    return {
        "events": [
            {
                "stream": event.stream,
                "seq": event.seq,
                "kind": event.kind,
                "actor": event.actor,
                "occurred_at": event.occurred_at.isoformat(),
                "hash": event.hash.hex(),
                "payload": event.shown,
            }
            for event in page.events
        ],
        "cursor": page.cursor.encode(),
        "held_back": held_back
        and {
            "events": held_back.events,
            "since": held_back.since.isoformat(),
            "blocking_pid": held_back.blocking_pid,
        },
    }


def _document(result: Verification) -> dict[str, Any]:
    return {
        "stream": result.stream,
        "events": result.events,
        "consistent": result.consistent,
        "first_bad_seq": result.first_bad_seq,
        "problem": result.problem or None,
    }


def _line(result: Verification, exported: Exported | None) -> str:
    if result.consistent:
        return f"{result.stream}  {result.events} events  {_word(result, exported)}"
    return f"{result.stream}  event {result.first_bad_seq} is bad: {result.problem}"


def _word(result: Verification, exported: Exported | None) -> str:
    copied = exported.heads.get(result.stream) if exported is not None else None
    return "consistent" if copied is None else f"unforged up to event {copied.seq}"


def _taken(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "nothing has happened since the newest checkpoint"
    return f"checkpoint {checkpoint.number} of {checkpoint.streams} streams, signed with key {checkpoint.key_id}"
