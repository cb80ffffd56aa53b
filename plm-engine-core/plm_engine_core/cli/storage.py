"""The books, as commands open them: the application's login and whichever delivery engine is installed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NoReturn, TypeVar
from uuid import UUID

import psycopg
from plm_shared.addresses import driver_dsn
from psycopg.conninfo import conninfo_to_dict

from plm_engine_core.cli.db import driver_words
from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import show_refusal
from plm_engine_core.control_plane.errors import ControlPlaneError, FeedPruned, Forbidden, NotFound, StorageUnavailable
from plm_engine_core.control_plane.identity import (
    AuditError,
    AuditTenantUnknown,
    PostgresAuditSink,
    SystemIdentities,
    audit_required,
)
from plm_engine_core.control_plane.storage.ports import Delivery
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.storage.postgres.signals import PostgresSignals
from plm_engine_core.control_plane.vocabulary import SystemActor

DELIVERY_GROUP = "plm.delivery"
"""Entry points of this group make the `Delivery` of the installed application, called without arguments."""

Answer = TypeVar("Answer")

_NOT_PREPARED = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.UndefinedTable,
)


class RecoveryDelivers:
    """For an installation without a delivery engine: recovery finds a queued run within its interval."""

    async def enqueue(self, connection: Any, tenant_id: UUID, run_id: UUID, *, after_seconds: float = 0.0) -> None:
        """Enqueue nothing; the run's own row says that it waits."""


@dataclass(frozen=True, kw_only=True)
class Books:
    """What a command works with."""

    storage: PostgresStorage
    audit: PostgresAuditSink
    signals: PostgresSignals


def with_books(work: Callable[[Books], Awaitable[Answer]], *, of: UUID | None = None, as_json: bool = False) -> Answer:
    """Run `work` on the database of PG_DSN; a refusal ends the command with its sentence and its reason.

    A tenant that `of` names has to be there: what a slip of the pen names has no events, and all of them are good.
    With `as_json` the refusal is also one object on stdout: `refused`, `reason` and `message`, as the API names them.
    """
    try:
        return asyncio.run(_run(work, of))
    except (ControlPlaneError, AuditError) as error:
        refused(error, as_json=as_json)


def as_platform(work: Callable[[Books], Awaitable[Answer]], *, of: UUID, as_json: bool = False) -> Answer:
    """Run `work` in one tenant as `system:cli`: what an operator does with nobody's token; see `with_books`."""
    required = recording()

    async def acting(books: Books) -> Answer:
        async with SystemIdentities(books.audit, required=required).acting(SystemActor.CLI, of):
            return await work(books)

    return with_books(acting, of=of, as_json=as_json)


def refused(error: ControlPlaneError | AuditError, *, as_json: bool) -> NoReturn:
    """End the command with the sentence and the reason of a refusal."""
    if isinstance(error, AuditTenantUnknown):  # nothing that could be tried again
        error = NotFound("tenant", error.tenant_id)
    reason = getattr(error, "reason", error.code)
    more: dict[str, Any] = {}
    if isinstance(error, Forbidden):
        more = {"missing_scopes": list(error.missing_scopes)}
    elif isinstance(error, FeedPruned):
        more = {"cursor": error.cursor}
    show_refusal(error.code, reason, str(error), as_json=as_json, **more)
    fail(ExitCode.FAILED, f"{error} [{reason}]")


async def _run(work: Callable[[Books], Awaitable[Answer]], of: UUID | None) -> Answer:
    async with _open() as books:
        try:
            if of is not None and of not in await books.storage.checkpoints.tenants():
                raise NotFound("tenant", of)
            return await work(books)
        except _NOT_PREPARED as error:
            raise StorageUnavailable(
                f"the database of PG_DSN is not one of this release, or its login not plm_app: {driver_words(error)}; "
                "`plm-cli db current` shows its revisions, `plm-cli db upgrade` prepares it"
            ) from error


def recording() -> bool:
    """Whether a command goes no further without its audit record; a setting that says neither ends it."""
    try:
        return audit_required()
    except ValueError as error:
        fail(ExitCode.NOT_CONFIGURED, str(error))


@asynccontextmanager
async def _open() -> AsyncIterator[Books]:
    async with open_pool(_dsn(), max_size=2) as pool:
        yield Books(
            storage=PostgresStorage(pool, _delivery()), audit=PostgresAuditSink(pool), signals=PostgresSignals(pool)
        )


def _dsn() -> str:
    dsn = os.environ.get("PG_DSN")
    if not dsn:
        fail(ExitCode.NOT_CONFIGURED, "set PG_DSN to the application's address: postgresql://plm_app:…@host/database")
    try:
        address = driver_dsn(dsn)
        conninfo_to_dict(address)  # a pool would try, and log, an address that cannot be read again and again
    except ValueError as error:
        fail(ExitCode.NOT_CONFIGURED, f"PG_DSN is {error}")
    except psycopg.Error as error:
        fail(ExitCode.NOT_CONFIGURED, f"PG_DSN: {driver_words(error)}")
    return address


def _delivery() -> Delivery:
    for entry in entry_points(group=DELIVERY_GROUP):
        made: Delivery = entry.load()()
        return made
    return RecoveryDelivers()
