"""The kernel's schema, revisions 0001 to 0012, and the three verbs that move a database through them.

They run as ``plm_owner`` after ``provision``, or as a superuser on a bare database. The revisions are frozen: a later
change is a new revision, and the engine's own revisions live in its own chain with its own version table.
"""

from __future__ import annotations

from pathlib import Path

from plm_shared.addresses import driver_dsn
from plm_shared.migrations.chain import config_of, revisions_of, script_of

__all__ = ["VERSION_TABLE", "current", "downgrade", "revisions", "sql_for", "stored_revision", "upgrade"]

VERSION_TABLE = "alembic_version_plm_shared"
_FOLDER = Path(__file__).parent


def upgrade(dsn: str, revision: str = "head") -> None:
    """Bring the database up to a revision; does nothing when it is there. All steps are one transaction."""
    from alembic import command

    command.upgrade(config_of(_FOLDER, dsn), revision)


def downgrade(dsn: str, revision: str = "base") -> None:
    """Take the database back to a revision. Data of the tables that go is lost; roles of the cluster may stay."""
    from alembic import command

    command.downgrade(config_of(_FOLDER, dsn), revision)


def current(dsn: str) -> str | None:
    """The revision the database stands at, or None before the first."""
    return stored_revision(dsn, VERSION_TABLE)


def revisions() -> list[str]:
    """Every revision there is here, oldest first."""
    return revisions_of(_FOLDER)


def stored_revision(dsn: str, version_table: str) -> str | None:
    """What a version table holds; None where there is no such table, or nothing in it.

    Raises:
        psycopg.errors.InsufficientPrivilege: the login may not read the table.
    """
    import psycopg
    from psycopg import sql

    query = sql.SQL("SELECT version_num FROM {}").format(sql.Identifier("public", version_table))
    try:
        with psycopg.connect(driver_dsn(dsn)) as connection:
            row = connection.execute(query).fetchone()
    except psycopg.errors.UndefinedTable:
        return None
    return str(row[0]) if row else None


def sql_for(revision: str = "head", *, since: str | None = None) -> str:
    """The statements of ``upgrade`` from an empty database or ``since``, for an administrator who runs them by hand."""
    return script_of(_FOLDER, since=since, revision=revision)
