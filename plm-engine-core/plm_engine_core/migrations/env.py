"""Alembic's entry: checks the floor below before the engine's revisions run."""

from __future__ import annotations

from pathlib import Path

import plm_shared.migrations as kernel
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from plm_shared.migrations.chain import run
from sqlalchemy import Connection

from plm_engine_core.migrations import VERSION_TABLE, KernelSchemaMissing


def _require_kernel_schema(connection: Connection) -> None:
    needed = ScriptDirectory(str(Path(kernel.__file__).parent)).get_current_head()
    options = {"version_table": kernel.VERSION_TABLE}
    found = MigrationContext.configure(connection, opts=options).get_current_revision()
    if found != needed:
        raise KernelSchemaMissing(found=found, needed=str(needed))


run(version_table=VERSION_TABLE, lock=0x706C6D03, require=_require_kernel_schema)
