"""Artifacts: where a stored file is and how long it stays."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE artifacts (
            id uuid PRIMARY KEY,
            tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
            trace_id text NOT NULL,
            run_id uuid REFERENCES runs (id) ON DELETE SET NULL,
            mime_type text NOT NULL,
            size_bytes bigint NOT NULL,
            backend text NOT NULL,
            storage_uri text NOT NULL,
            retention_until timestamptz,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute("CREATE INDEX ix_artifacts_tenant_trace ON artifacts (tenant_id, trace_id)")
    op.execute("CREATE INDEX ix_artifacts_run_id ON artifacts (run_id)")


def downgrade() -> None:
    op.execute("DROP TABLE artifacts")
