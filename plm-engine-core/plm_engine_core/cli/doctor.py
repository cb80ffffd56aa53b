"""``plm-cli doctor``: is a live database as it should be? It looks and probes, and changes nothing."""

from __future__ import annotations

import os
from dataclasses import asdict

import typer
from plm_shared.addresses import driver_dsn
from plm_shared.doctor import Diagnosis, doctor_tenancy

from plm_engine_core.cli.db import database_errors, owner_dsn
from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, show

app = typer.Typer(help="Examine a live database; nothing is changed.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``tenancy`` a command of its own although it is the only one so far."""


@app.command("tenancy")
def tenancy(as_json: AsJson = False) -> None:
    """Check that tenants are kept apart, and print each fault with the statement that mends it.

    The catalogue is read with PG_ADMIN_DSN (else PG_DSN); the probes, as two tenants and as none, log in with PG_DSN,
    which must be the application's address. They are rolled back.
    Status 0: nothing is wrong, 1: something is, or the database refused; 3: no address.
    """
    catalogue, application = owner_dsn(), _application_dsn()
    with database_errors():
        found = doctor_tenancy(catalogue, application)
    answer = {"healthy": not found, "found": [asdict(each) for each in found]}
    show(answer, "\n".join(_lines(each) for each in found) or "every tenant is kept apart", as_json=as_json)
    if found:
        raise typer.Exit(int(ExitCode.FAILED))


def _lines(found: Diagnosis) -> str:
    return f"{found.rule}: {found.name} {found.problem}\n    {found.remedy};"


def _application_dsn() -> str:
    dsn = os.environ.get("PG_DSN")
    if not dsn:
        fail(ExitCode.NOT_CONFIGURED, "set PG_DSN to the application's address: postgresql://plm_app:…@host/database")
    try:
        return driver_dsn(dsn)
    except ValueError as error:
        fail(ExitCode.NOT_CONFIGURED, f"PG_DSN is {error}")
