"""The engine's schema, revisions 0013 onwards, with a version table of its own in the database of plm-shared.

They run as ``plm_owner`` on a database whose plm-shared schema stands at its head; anything else is refused before a
statement is sent, because the engine's tables refer to plm-shared's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plm_shared.addresses import sqlalchemy_url
from plm_shared.migrations import stored_revision

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["VERSION_TABLE", "KernelSchemaMissing", "current", "downgrade", "revisions", "upgrade"]

VERSION_TABLE = "alembic_version_plm_engine_core"


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

    command.upgrade(_config(dsn), revision)


def downgrade(dsn: str, revision: str = "base") -> None:
    """Take the engine's tables back to a revision; plm-shared's stay. Data of the tables that go is lost."""
    from alembic import command

    command.downgrade(_config(dsn), revision)


def current(dsn: str) -> str | None:
    """The engine's revision in this database, or None before the first."""
    return stored_revision(dsn, VERSION_TABLE)


def revisions() -> list[str]:
    """Every revision there is here, oldest first: each file of ``versions/`` begins with its number."""
    return sorted(path.name.partition("_")[0] for path in (Path(__file__).parent / "versions").glob("[0-9]*_*.py"))


def _config(dsn: str) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = sqlalchemy_url(dsn)
    return config
