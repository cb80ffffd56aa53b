"""Which database this installation uses: the operator's, or an embedded one for a laptop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision

from plm_backend.errors import SetupError
from plm_backend.settings import Settings
from plm_backend.state import LocalState

DATABASE = "plm"


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
        SetupError: no database is named outside development.
    """
    if settings.pg_dsn:
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


def upgrade_all(owner_dsn: str) -> None:
    """Run every installed package's migrations, in the order of the floors; does nothing where all is applied."""
    for chain in sorted(entry_points(group="plm.migrations"), key=lambda each: each.name):
        chain.load().upgrade(owner_dsn)
