"""Locks of resources, taken by admission itself for capabilities that say so.

Two functions are replaced, for nodes of every release that calls them: only a command that names a lock is booked in
another way, and nodes of earlier releases send none.

Revision ID: 0048
Revises: 0047
"""

from __future__ import annotations

import re
from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0048"
down_revision = "0047"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE resource_locks (
    tenant_id     uuid        NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    scope         text        NOT NULL CHECK (scope IN ('run', 'tenant')),
    scope_id      uuid        NOT NULL,
    resource_hash bytea       NOT NULL,
    run_id        uuid        NOT NULL,
    step_index    integer     NOT NULL,
    attempt       integer     NOT NULL,
    grant_id      uuid        NOT NULL,
    taken_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, scope, scope_id, resource_hash)
) WITH (fillfactor = 50);
ALTER TABLE resource_locks ENABLE ROW LEVEL SECURITY;
ALTER TABLE resource_locks FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON resource_locks
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
GRANT SELECT, INSERT, DELETE ON resource_locks TO plm_engine_writer;
GRANT UPDATE (run_id, step_index, attempt, grant_id, taken_at) ON resource_locks TO plm_engine_writer;
"""

NEW = (
    "engine_lock_holder_v1(resource_locks)",
    "engine_locked_v1(jsonb, resource_locks, text)",
    "engine_take_lock_v1(jsonb)",
    "engine_sweep_locks_v1(uuid, integer)",
)

REPLACED = {
    "admit_v7_locks": ("admit_v7", "engine_admit_v7"),
    "admit_otherwise_v6_locks": ("admit_v6", "engine_admit_otherwise_v6"),
}
"""Of each file: where the function was written before, and its name."""

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    op.execute(TABLE)
    for name in ("resource_locks_v1", *REPLACED):
        send_as_written((_FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in NEW:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for file, name in REPLACED.values():
        text = (_FOLDER / f"{file}.sql").read_text(encoding="utf-8")
        (before,) = re.findall(rf"CREATE (FUNCTION {name}\(.*?\n\$\$;)", text, re.DOTALL)
        send_as_written(f"CREATE OR REPLACE {before}")
    for signature in reversed(NEW):
        op.execute(f"DROP FUNCTION {signature}")
    op.execute("DROP TABLE resource_locks")
