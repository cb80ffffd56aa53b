"""Alembic's entry: connects, takes the migration lock, checks the floor below, runs the revisions at once."""

from __future__ import annotations

import os
from pathlib import Path

import plm_shared.migrations as kernel
from alembic import context
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from plm_shared.addresses import sqlalchemy_url
from sqlalchemy import Connection, create_engine, pool, text

from plm_engine_core.migrations import VERSION_TABLE, KernelSchemaMissing

_LOCK = 0x706C6D03  # two upgrades at once wait for each other


def _url() -> str:
    url = context.config.attributes.get("url")
    if url:
        return str(url)
    address = os.environ.get("PG_DSN")
    if not address:
        raise RuntimeError("PG_DSN is not set; set it to postgresql+psycopg://user:password@host:5432/database")
    return sqlalchemy_url(address)


def _require_kernel_schema(connection: Connection) -> None:
    needed = ScriptDirectory(str(Path(kernel.__file__).parent)).get_current_head()
    options = {"version_table": kernel.VERSION_TABLE}
    found = MigrationContext.configure(connection, opts=options).get_current_revision()
    if found != needed:
        raise KernelSchemaMissing(found=found, needed=str(needed))


def _run_offline() -> None:
    # The default parameter style would print every % of a function body twice.
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        version_table=VERSION_TABLE,
        literal_binds=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _run_online() -> None:
    engine = create_engine(_url(), poolclass=pool.NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        _require_kernel_schema(connection)
        context.configure(connection=connection, version_table=VERSION_TABLE)
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    _run_offline()
else:
    _run_online()
