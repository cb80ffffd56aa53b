"""Which database this installation uses: the operator's, or an embedded one for a laptop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
from plm_engine_core.cli.db import installed_chains
from plm_shared.addresses import driver_dsn
from plm_shared.embedded_postgres import EmbeddedPostgres, LocationUnsuitable
from plm_shared.provisioning import database_urls, provision

from plm_backend.errors import SetupError
from plm_backend.settings import Settings
from plm_backend.state import LocalState

DATABASE = "plm"
_CONNECT_SECONDS = 10
_FITNESS = """
WITH known AS (
    SELECT c.relowner FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = 'public' AND c.relname = 'run_states'
)
SELECT EXISTS (SELECT FROM known)
           AND EXISTS (SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
                       WHERE n.nspname = 'delivery' AND p.proname = 'enqueue_drive_v1'),
       r.rolsuper OR r.rolbypassrls OR EXISTS (SELECT FROM known WHERE pg_has_role(relowner, 'USAGE'))
FROM pg_roles AS r WHERE r.rolname = current_user
"""


@dataclass(frozen=True, kw_only=True)
class Database:
    """A migrated database, as the application reaches it; `owner` is known only where we may migrate it."""

    app: str = field(repr=False)
    owner: str | None = field(default=None, repr=False)
    version: str = ""
    embedded: bool = False


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The database of these settings.

    `PG_DSN` names the operator's own, which is taken as it is. Without it, in development, an embedded server runs for
    the length of the block, provisioned and migrated.

    Raises:
        SetupError: no database is named outside development, or the named one cannot be used as it is.
    """
    if settings.pg_dsn:
        check_database(settings.pg_dsn)
        yield Database(app=settings.pg_dsn, owner=settings.pg_admin_dsn)
        return
    if not settings.development:
        raise SetupError(
            f"PG_DSN is not set and ENVIRONMENT is {settings.environment!r}; name the application's database in PG_DSN"
        )
    state = LocalState(settings.state_dir)
    with EmbeddedPostgres(settings.state_dir / "postgres") as server:
        urls = provision(
            server.admin_dsn,
            DATABASE,
            owner_password=state.secret("plm_owner"),
            app_password=state.secret("plm_app"),
        )
        upgrade_all(urls.owner)
        yield Database(app=urls.app, owner=urls.owner, version=f"PostgreSQL {server.major}", embedded=True)


def check_database(dsn: str) -> None:
    """Find out before the first request whether the operator's database can be used.

    Raises:
        SetupError: it is not reachable, not migrated, or its login is one that row-level security does not bind.
    """
    try:
        with psycopg.connect(driver_dsn(dsn), connect_timeout=_CONNECT_SECONDS) as connection:
            row = connection.execute(_FITNESS).fetchone()
    except ValueError as error:
        raise SetupError(f"PG_DSN is {error}") from error
    except psycopg.Error as error:
        reason = " ".join(str(error).split())
        raise SetupError(f"the database that PG_DSN names cannot be used: {reason}") from error
    migrated, unbound = row or (False, False)
    if not migrated:
        raise SetupError(
            "the database that PG_DSN names is not migrated; run `plm-cli db upgrade` with its owner's address in "
            "PG_ADMIN_DSN"
        )
    if unbound:
        raise SetupError(
            "the login of PG_DSN is a superuser, the tables' owner or exempt from row-level security, so tenants would "
            "not be kept apart; name the application's login, plm_app"
        )


def local_addresses(settings: Settings) -> dict[str, str]:
    """`PG_DSN` and `PG_ADMIN_DSN` (the owner's) of this installation's database, for a shell of its operator.

    Raises:
        SetupError: the embedded server is not running; it runs as long as `plm-cli serve` does.
    """
    if settings.pg_dsn:
        return {"PG_DSN": settings.pg_dsn, **({"PG_ADMIN_DSN": settings.pg_admin_dsn} if settings.pg_admin_dsn else {})}
    server = EmbeddedPostgres(settings.state_dir / "postgres")
    state = LocalState(settings.state_dir)
    try:
        urls = database_urls(
            server.admin_dsn, DATABASE, owner_password=state.secret("plm_owner"), app_password=state.secret("plm_app")
        )
        running = server.running
    except LocationUnsuitable:
        running = False
    if not running:
        raise SetupError("the embedded database is not running; start `plm-cli serve` in another terminal first")
    return {"PG_DSN": urls.app, "PG_ADMIN_DSN": urls.owner}


def upgrade_all(owner_dsn: str) -> None:
    """Run every installed package's migrations, in the order of the floors; does nothing where all is applied."""
    for chain in installed_chains():
        chain.upgrade(owner_dsn)
