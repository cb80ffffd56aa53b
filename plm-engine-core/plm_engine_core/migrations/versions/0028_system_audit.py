"""The audit log of the installation: refused tokens that prove no tenant. Written once, changed by nobody.

It belongs to no tenant, so no row-level security guards it; the application may only add to it.

Revision ID: 0028
Revises: 0027
"""

from __future__ import annotations

from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE audit_log_system (
            id uuid NOT NULL PRIMARY KEY,
            event_type text NOT NULL CHECK (event_type <> ''),
            payload jsonb NOT NULL DEFAULT '{}',
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute("CREATE INDEX ix_audit_log_system_created ON audit_log_system (created_at DESC)")
    op.execute(
        "CREATE TRIGGER audit_log_system_append_only BEFORE UPDATE OR DELETE ON audit_log_system "
        "FOR EACH ROW EXECUTE FUNCTION engine_refuse_change()"
    )
    op.execute(
        "CREATE TRIGGER audit_log_system_no_truncate BEFORE TRUNCATE ON audit_log_system "
        "FOR EACH STATEMENT EXECUTE FUNCTION engine_refuse_change()"
    )
    for trigger in ("audit_log_system_append_only", "audit_log_system_no_truncate"):
        # ALWAYS: an ordinary trigger would rest while session_replication_role is 'replica'.
        op.execute(f"ALTER TABLE audit_log_system ENABLE ALWAYS TRIGGER {trigger}")
    op.execute("REVOKE ALL ON audit_log_system FROM PUBLIC")
    op.execute("GRANT INSERT ON audit_log_system TO plm_engine_writer")


def downgrade() -> None:
    op.execute("DROP TABLE audit_log_system")
