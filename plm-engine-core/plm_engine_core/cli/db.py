"""``plm-cli db``: the schema of every installed package, and tenants. All of it needs the owner's login."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from uuid import UUID

import psycopg
import typer
from plm_shared.addresses import driver_dsn
from plm_shared.provisioning import APP, OWNER, provision, script_for

from plm_engine_core.cli.chains import installed_chains, plan_all, upgrade_all
from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, show
from plm_engine_core.control_plane.ids import new_id

_SCRIPT = f"""\\set ON_ERROR_STOP on
{{before}}SET client_min_messages = warning;
SET ROLE {OWNER};

{{waiting}}
RESET ROLE;"""
_PASSWORDS = f"""
-- Each asks for the password of a login, which appears in no script and no log.
\\password {OWNER}
\\password {APP}"""

app = typer.Typer(help="Bring the database's schema up to date; create tenants.", no_args_is_help=True)


@app.command("upgrade")
def upgrade(as_json: AsJson = False) -> None:
    """Run the migrations of every installed package, in floor order. Doing it again changes nothing.

    The address comes from PG_ADMIN_DSN, else PG_DSN; it must be the owner's (plm_owner).
    Status 0: up to date, 1: failed, 3: no address.
    """
    dsn = owner_dsn()
    with database_errors():
        upgrade_all(dsn)
    _show_revisions(dsn, as_json=as_json)


@app.command("plan")
def plan(
    new_database: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for a database that is not there yet, roles included.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the SQL that `upgrade` would run, for an administrator who must run it in psql as a superuser.

    What the database has already is left out; its address comes from PG_ADMIN_DSN, else PG_DSN, and nothing is changed
    there. With --new-database no server is asked: the script creates the roles and the database first.
    Status 0: printed, 1: failed, 2: wrong name, 3: no address.
    """
    try:
        before = script_for(new_database) if new_database is not None else ""
    except ValueError as error:
        fail(ExitCode.USAGE, f"--new-database {error}")
    dsn = owner_dsn() if new_database is None else None
    with database_errors():
        waiting = plan_all(dsn)
    text = _SCRIPT.format(before=before, waiting=waiting) if waiting else "-- Nothing to do: the schema is up to date."
    text += _PASSWORDS if before else ""
    show({"sql": text}, text, as_json=as_json)


@app.command("current")
def current(as_json: AsJson = False) -> None:
    """Show each package's revision in the database. Status 0: shown, 1: failed, 3: no address."""
    _show_revisions(owner_dsn(), as_json=as_json)


@app.command("provision")
def provision_database(
    database: Annotated[str, typer.Option(help="The database to create, or to secure if it exists.")] = "plm",
    as_json: AsJson = False,
) -> None:
    """Create the roles and an empty database on your own server, and print its two addresses for a shell.

    The superuser's address comes from PG_SUPERUSER_DSN and is used for nothing else. The passwords are new each time,
    so doing it again locks out whoever still uses the old ones. Status 0: created, 1: refused, 3: no address.
    """
    dsn = os.environ.get("PG_SUPERUSER_DSN")
    if not dsn:
        fail(
            ExitCode.NOT_CONFIGURED,
            "set PG_SUPERUSER_DSN to a superuser's address: postgresql://postgres:…@host/postgres",
        )
    try:
        with database_errors():
            urls = provision(dsn, database)
    except ValueError as error:
        fail(ExitCode.NOT_CONFIGURED, f"PG_SUPERUSER_DSN is {error}")
    addresses = {"PG_DSN": urls.app, "PG_ADMIN_DSN": urls.owner}
    text = "\n".join(f"export {name}={shlex.quote(address)}" for name, address in addresses.items())
    show(addresses, text, as_json=as_json)


@app.command("create-tenant")
def create_tenant(
    name: Annotated[str, typer.Option(help="What people call the tenant.")],
    tenant_id: Annotated[UUID | None, typer.Option(help="Its id; a new one by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create a tenant and print its id. The same id and name again change nothing.

    Status 0: it exists, 1: the id belongs to a tenant of another name, or the database refused; 2: wrong arguments,
    3: no address.
    """
    name = name.strip()
    if not name.isprintable() or not 0 < len(name) <= 200:
        fail(ExitCode.USAGE, "--name must be 1 to 200 printable characters")
    dsn, tenant = owner_dsn(), tenant_id or new_id()
    with database_errors(), psycopg.connect(driver_dsn(dsn)) as connection:
        created = connection.execute(
            "INSERT INTO tenants (id, name) VALUES (%s, %s) ON CONFLICT (id) DO NOTHING RETURNING id", (tenant, name)
        ).fetchone()
        row = connection.execute("SELECT name FROM tenants WHERE id = %s", (tenant,)).fetchone()
    if row is None or row[0] != name:
        fail(ExitCode.FAILED, f"tenant {tenant} exists under another name; choose another --tenant-id")
    show({"tenant_id": tenant, "name": name, "created": created is not None}, str(tenant), as_json=as_json)


def owner_dsn() -> str:
    """The owner's address from the environment, never from an argument; ends the command when there is none."""
    dsn = os.environ.get("PG_ADMIN_DSN") or os.environ.get("PG_DSN")
    if not dsn:
        fail(ExitCode.NOT_CONFIGURED, "set PG_ADMIN_DSN to the owner's address: postgresql://plm_owner:…@host/database")
    try:
        return driver_dsn(dsn)
    except ValueError as error:
        fail(ExitCode.NOT_CONFIGURED, f"PG_ADMIN_DSN (or PG_DSN) is {error}")


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn the database's refusals, and those of a chain such as `KernelSchemaMissing`, into one sentence."""
    try:
        yield
    except Exception as error:
        if not is_of_database(error):
            raise
        fail(ExitCode.FAILED, database_sentence(error))


def is_of_database(error: Exception) -> bool:
    """Whether the database, or a chain of migrations, refused something."""
    from sqlalchemy.exc import DBAPIError

    return isinstance(error, psycopg.Error | DBAPIError | RuntimeError)


def database_sentence(error: Exception) -> str:
    """One sentence for what went wrong; it may name hosts and roles, never a password."""
    from sqlalchemy.exc import DBAPIError

    reason = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(reason, psycopg.errors.InsufficientPrivilege):
        return f"the login may not do this ({reason.diag.message_primary}); set PG_ADMIN_DSN to the owner's address"
    if isinstance(reason, psycopg.errors.UndefinedTable):
        return "the database has no schema yet; run `plm-cli db upgrade` first"
    if isinstance(reason, psycopg.errors.DiskFull):
        return f"no space is left for the database ({reason.diag.message_primary}); make room, then repeat"
    if isinstance(reason, psycopg.Error):
        return f"the database refused: {driver_words(reason)}"
    return str(reason)


def driver_words(error: psycopg.Error) -> str:
    """What the driver says, on one line; it may name hosts and roles, never a password."""
    if isinstance(error, psycopg.ProgrammingError) and error.sqlstate is None:
        # It repeats the part of the address that it cannot read.
        return "the address cannot be read; percent-encode what has a meaning in a URL"
    return " ".join(str(error).split())


def _show_revisions(dsn: str, *, as_json: bool) -> None:
    with database_errors():
        revisions = {chain.name: chain.current(dsn) for chain in installed_chains()}
    text = "\n".join(f"{name}  {revision or '-'}" for name, revision in revisions.items())
    show({"revisions": revisions}, text, as_json=as_json)
