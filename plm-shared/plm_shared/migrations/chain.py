"""What every package's chain of migrations has in common: how Alembic is set up for it, and how it runs."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from plm_shared.addresses import sqlalchemy_url

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

__all__ = ["config_of", "revisions_of", "run", "script_of", "send_as_written"]


def config_of(folder: Path, dsn: str) -> Config:
    """Alembic's configuration of the chain in a folder, for the database of an address."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = sqlalchemy_url(dsn)
    return config


def revisions_of(folder: Path) -> list[str]:
    """Every revision of the chain in a folder, oldest first: each file of ``versions/`` begins with its number."""
    return sorted(path.name.partition("_")[0] for path in (folder / "versions").glob("[0-9]*_*.py"))


def script_of(folder: Path, *, since: str | None = None, revision: str = "head") -> str:
    """The statements that bring a database from ``since``, or from nothing, to a revision, as one transaction.

    Empty where there is nothing to do. What ``require`` of ``run`` would look at is left to whoever runs them.
    """
    from alembic import command

    script = io.StringIO()
    config = config_of(folder, "postgresql://")
    config.output_buffer = script
    known = revisions_of(folder)
    if since == (known[-1] if revision == "head" else revision):
        return ""
    command.upgrade(config, f"{since}:{revision}" if since else revision, sql=True)
    return script.getvalue()


def send_as_written(statements: str) -> None:
    """Send SQL of a migration's file; SQLAlchemy would read its JSON operators and casts as bind parameters."""
    from alembic import op

    context = op.get_context()
    if context.as_sql:
        context.impl.static_output(f"{statements.rstrip().removesuffix(';')};")
    else:
        op.get_bind().exec_driver_sql(statements.replace("%", "%%"))


def run(*, version_table: str, lock: int, require: Callable[[Connection], None] = lambda _: None) -> None:
    """Run what Alembic was asked for: the whole of a chain's ``env.py``.

    On a database it is one transaction, and two at once wait for each other by the advisory lock of this number;
    ``require`` then looks at the database before anything is changed, and raises where it does not fit.

    Raises:
        RuntimeError: Alembic was called without an address, and PG_DSN names none.
    """
    from alembic import context

    if context.is_offline_mode():
        _run_offline(version_table)
    else:
        _run_online(version_table, lock, require)


def _run_offline(version_table: str) -> None:
    from alembic import context

    # The default parameter style would print every % of a function body twice.
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        version_table=version_table,
        literal_binds=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _run_online(version_table: str, lock: int, require: Callable[[Connection], None]) -> None:
    from alembic import context
    from sqlalchemy import create_engine, pool, text

    engine = create_engine(_url(context.config.attributes.get("url")), poolclass=pool.NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
        require(connection)
        context.configure(connection=connection, version_table=version_table)
        with context.begin_transaction():
            context.run_migrations()


def _url(given: str | None) -> str:
    if given:
        return given
    address = os.environ.get("PG_DSN")
    if not address:
        raise RuntimeError("PG_DSN is not set; set it to postgresql+psycopg://user:password@host:5432/database")
    return sqlalchemy_url(address)
