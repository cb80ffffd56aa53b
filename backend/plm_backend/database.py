"""Which database this installation uses: the operator's, or an embedded one for a laptop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from plm_engine_core.cli.chains import upgrade_all as run_migrations
from plm_engine_core.cli.db import database_sentence, is_of_database
from plm_shared.embedded_postgres import EmbeddedPostgres, LocationUnsuitable, PostgresUnavailable
from plm_shared.provisioning import database_urls, provision

from plm_backend.errors import SetupError
from plm_backend.fitness import check_database
from plm_backend.settings import Settings
from plm_backend.state import LocalState

DATABASE = "plm"


@dataclass(frozen=True, kw_only=True)
class Database:
    """A migrated database, as the application reaches it.

    `owner` is known only where we may migrate it, `server` only where it is an embedded one.
    """

    app: str = field(repr=False)
    owner: str | None = field(default=None, repr=False)
    server: EmbeddedPostgres | None = None


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The database of these settings.

    `PG_DSN` names the operator's own, which is taken as it is. Without it, in development, an embedded server runs for
    the length of the block, provisioned and migrated.

    Raises:
        SetupError: no database is named outside development, or the named one cannot be used as it is.
    """
    if settings.pg_dsn:
        check_database(settings, settings.pg_dsn)
        yield Database(app=settings.pg_dsn, owner=settings.pg_admin_dsn)
        return
    if not settings.development:
        raise SetupError(
            f"PG_DSN is not set and ENVIRONMENT is {settings.environment!r}; name the application's database in PG_DSN"
        )
    state = LocalState(settings.state_dir)
    server = EmbeddedPostgres(settings.state_dir / "postgres")
    try:
        server.start()
        with _owner_errors():
            urls = provision(
                server.admin_dsn,
                DATABASE,
                owner_password=state.secret("plm_owner"),
                app_password=state.secret("plm_app"),
            )
        upgrade_all(urls.owner)
        yield Database(app=urls.app, owner=urls.owner, server=server)
    finally:  # an interrupted start leaves no server behind either
        server.stop()


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
    """Run every installed package's migrations, in the order of the floors; does nothing where all is applied.

    Raises:
        SetupError: the address, the server, its login or what it holds does not fit; nothing was changed.
    """
    with _owner_errors():
        run_migrations(owner_dsn)


@contextmanager
def _owner_errors() -> Iterator[None]:
    try:
        yield
    except PostgresUnavailable:
        raise
    except Exception as error:
        if not isinstance(error, ValueError) and not is_of_database(error):
            raise
        raise SetupError(f"the database could not be prepared: {database_sentence(error)}") from error
