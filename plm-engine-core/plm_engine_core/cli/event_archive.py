"""``plm-cli events archive``: exports in an artifact store, and how long the database keeps what stands in them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import psycopg
import typer
from plm_shared.addresses import driver_dsn

from plm_engine_core.cli.db import database_errors, owner_dsn
from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, show
from plm_engine_core.cli.storage import Books, as_platform
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events import (
    Archive,
    Archivist,
    Exported,
    Piece,
    PublicKeys,
    load_public_keys,
    open_archive,
    prune_events,
)
from plm_engine_core.control_plane.vocabulary import SystemActor

app = typer.Typer(help="Keep exports in an artifact store, and prune what they hold.", no_args_is_help=True)

TenantId = Annotated[UUID, typer.Option(help="Whose streams.")]
Place = Annotated[
    str, typer.Option("--archive", envvar="PLM_EVENTS_ARCHIVE", help="A folder, or s3://bucket?endpoint=URL.")
]
Believed = Annotated[
    list[Path], typer.Option("--public-key", help="A key whose signatures are believed (PEM); repeat.")
]


@app.command("write")
def write(tenant_id: TenantId, archive: Place, as_json: AsJson = False) -> None:
    """Store what is signed and not archived yet, as `serve` and `worker` do by themselves.

    Status 0: the archive is up to the newest checkpoint, 1: not; 2: wrong arguments; 3: no address.
    """
    place = _opened(archive)

    async def stored(books: Books) -> list[Piece]:
        try:
            return await Archivist(books.storage, place).archive(tenant_id)
        except (OSError, ValueError) as error:
            fail(ExitCode.FAILED, f"the archive could not be written: {error}")

    pieces = as_platform(stored, of=tenant_id, as_json=as_json)
    newest = pieces[-1].number if pieces else None
    answer = {"tenant_id": tenant_id, "pieces": [piece.uri for piece in pieces], "checkpoint": newest}
    text = f"stored up to checkpoint {newest}" if pieces else "the archive holds everything that is signed"
    show(answer, text, as_json=as_json)


@app.command("verify")
def verify(tenant_id: TenantId, archive: Place, public_key: Believed, as_json: AsJson = False) -> None:
    """Check the archive alone, without a database: every event, every checkpoint and every signature.

    Status 0: unforged, 1: not; 2: wrong arguments.
    """
    try:
        keys = load_public_keys(public_key)
    except InvalidRequest as error:
        fail(ExitCode.USAGE, str(error))
    found = read_archive(archive, tenant_id, keys)
    newest = found.newest
    answer: dict[str, Any] = {
        "tenant_id": tenant_id,
        "unforged": found.unforged,
        "checkpoint": newest.number if newest else None,
        "streams": len(found.heads),
        "events": found.events,
    }
    text = f"unforged: {found.events} events in {len(found.heads)} streams, up to checkpoint {answer['checkpoint']}"
    show(answer, text, as_json=as_json)


@app.command("keep")
def keep(
    tenant_id: TenantId,
    days: Annotated[int | None, typer.Option(min=1, max=36_500, help="How long events stay in the database.")] = None,
    forever: Annotated[bool, typer.Option("--forever", help="Prune nothing, as at first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Set how long a tenant's events stay in the database once they are archived; asked of the owner (PG_ADMIN_DSN).

    Status 0: set, 1: there is no such tenant, or the database refused; 2: wrong arguments; 3: no address.
    """
    if (days is None) is not forever:
        fail(ExitCode.USAGE, "say --days N or --forever, one of the two")
    with database_errors(), psycopg.connect(driver_dsn(owner_dsn())) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(tenant_id)])
        if connection.execute("SELECT FROM tenants WHERE id = %s", [tenant_id]).fetchone() is None:
            fail(ExitCode.FAILED, f"tenant {tenant_id} does not exist")
        if days is None:
            connection.execute("DELETE FROM event_retention WHERE tenant_id = %s", [tenant_id])
        else:
            connection.execute(
                "INSERT INTO event_retention (tenant_id, keep) VALUES (%(tenant)s, make_interval(days => %(days)s)) "
                "ON CONFLICT (tenant_id) DO UPDATE SET keep = EXCLUDED.keep, set_at = clock_timestamp()",
                {"tenant": tenant_id, "days": days},
            )
    text = f"events are kept for {days} days" if days is not None else "events are kept for ever"
    show({"tenant_id": tenant_id, "days": days}, text, as_json=as_json)


@app.command("prune")
def prune(tenant_id: TenantId, as_json: AsJson = False) -> None:
    """Remove what is older than the tenant's `keep` and archived, of streams whose run has ended; the rest verifies on.

    It does so in short transactions. Interrupt it at any point, and call it again: it goes on with what is left.

    Status 0: done, or there was nothing to remove; 1: the database refused; 3: no address.
    """
    pruned = as_platform(
        lambda books: prune_events(books.storage.checkpoints, tenant_id, actor=SystemActor.CLI.value),
        of=tenant_id,
        as_json=as_json,
    )
    status, text = "nothing", "nothing to prune"
    if pruned.events:
        status = "pruned"
        text = f"{pruned.events} events of {pruned.streams} streams up to checkpoint {pruned.checkpoint} are gone"
    show({"tenant_id": tenant_id, "status": status, **asdict(pruned)}, text, as_json=as_json)


def read_archive(address: str, tenant_id: UUID, keys: PublicKeys) -> Exported:
    """What the archive holds of a tenant, checked; ends the command when it is not what was signed."""
    try:
        found = _opened(address).read(tenant_id, keys)
    except OSError as error:
        fail(ExitCode.FAILED, f"the archive cannot be read: {error}")
    if found.problem:
        fail(ExitCode.FAILED, f"the archive is not what was signed: {found.problem}")
    if found.newest is None:
        fail(ExitCode.FAILED, f"the archive holds nothing of tenant {tenant_id}")
    return found


def _opened(address: str) -> Archive:
    try:
        return open_archive(address)
    except InvalidRequest as error:
        fail(ExitCode.USAGE, str(error))
