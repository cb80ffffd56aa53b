"""The engine's schema, revisions 0013 onwards, with a version table of its own in the database of plm-shared.

They run as ``plm_owner`` on a database whose plm-shared schema stands at its head; anything else is refused before a
statement is sent, because the engine's tables refer to plm-shared's.
"""

from __future__ import annotations

from pathlib import Path

from plm_shared.migrations import stored_revision
from plm_shared.migrations.chain import config_of, revisions_of, script_of

__all__ = ["VERSION_TABLE", "KernelSchemaMissing", "current", "downgrade", "revisions", "sql_for", "upgrade"]

VERSION_TABLE = "alembic_version_plm_engine_core"
_FOLDER = Path(__file__).parent


class KernelSchemaMissing(RuntimeError):
    """The database lacks plm-shared's schema, or has an older one; nothing was changed."""

    def __init__(self, *, found: str | None, needed: str) -> None:
        state = "has no plm-shared schema" if found is None else f"has plm-shared's schema at revision {found}"
        super().__init__(
            f"the database {state}; the engine needs revision {needed}: run `plm-cli db upgrade`, which brings both up"
        )
        self.found = found
        self.needed = needed


def upgrade(dsn: str, revision: str = "head") -> None:
    """Bring the database up to a revision; does nothing when it is there. All steps are one transaction.

    Raises:
        KernelSchemaMissing: plm-shared's schema is not at its head in this database.
    """
    from alembic import command

    command.upgrade(config_of(_FOLDER, dsn), revision)


def downgrade(dsn: str, revision: str = "base") -> None:
    """Take the engine's tables back to a revision; plm-shared's stay. Data of the tables that go is lost."""
    from alembic import command

    command.downgrade(config_of(_FOLDER, dsn), revision)


def current(dsn: str) -> str | None:
    """The engine's revision in this database, or None before the first."""
    return stored_revision(dsn, VERSION_TABLE)


def revisions() -> list[str]:
    """Every revision there is here, oldest first."""
    return revisions_of(_FOLDER)


def sql_for(revision: str = "head", *, since: str | None = None) -> str:
    """The statements of ``upgrade`` from plm-shared's schema or ``since``, for whoever runs them by hand."""
    return script_of(_FOLDER, since=since, revision=revision)
