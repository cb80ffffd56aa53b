"""Calls of connectors, with their cost."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE connector_calls (
            id uuid PRIMARY KEY,
            tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
            run_id uuid REFERENCES runs (id) ON DELETE SET NULL,
            span_id text NOT NULL,
            connector_id text NOT NULL,
            capability text NOT NULL,
            envelope jsonb NOT NULL DEFAULT '{}',
            cost_eur numeric(18, 8),
            cost_status cost_status NOT NULL DEFAULT 'pending',
            pricing_version text NOT NULL,
            idempotency_key text NOT NULL UNIQUE,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute("CREATE INDEX ix_connector_calls_run_id ON connector_calls (run_id)")


def downgrade() -> None:
    op.execute("DROP TABLE connector_calls")
