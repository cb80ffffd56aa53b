"""Telemetry events: the append-only part of the ledger.

The column-level UNIQUE is unnamed on purpose: PostgreSQL's own name for it is part of the contract.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE telemetry_events (
            id uuid PRIMARY KEY,
            tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
            trace_id text NOT NULL,
            span_id text NOT NULL,
            parent_span_id text,
            event_type text NOT NULL,
            capability text NOT NULL,
            payload jsonb NOT NULL DEFAULT '{}',
            idempotency_key text NOT NULL UNIQUE,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute(
        """
        CREATE INDEX ix_telemetry_events_tenant_trace_span
            ON telemetry_events (tenant_id, trace_id, span_id)
        """
    )


def downgrade() -> None:
    op.execute("DROP TABLE telemetry_events")
