"""Row-level security on the five tenant tables, and the one role that may look past it.

The NULLIF form makes an unset tenant and the empty text that a pooled connection leaves behind the same: no rows.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_TABLES = ("runs", "telemetry_events", "llm_calls", "connector_calls", "artifacts")
_MINE = "tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid"


def upgrade() -> None:
    for table in _TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant_isolation ON {table} USING ({_MINE}) WITH CHECK ({_MINE})")
    op.execute(
        """
        DO $$ BEGIN
            IF NOT (SELECT rolbypassrls FROM pg_roles WHERE rolname = 'plm_migrator') THEN
                ALTER ROLE plm_migrator BYPASSRLS;
            END IF;
        END $$
        """
    )


def downgrade() -> None:
    # The role's attribute stays: it belongs to the cluster, and another database may rely on it.
    for table in reversed(_TABLES):
        op.execute(f"DROP POLICY tenant_isolation ON {table}")
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
