"""The logical identity of each ledger row: one event of a type per span, one call per span."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_IDENTITIES = (
    ("telemetry_events", "tenant_id, trace_id, span_id, event_type"),
    ("llm_calls", "tenant_id, span_id"),
    ("connector_calls", "tenant_id, span_id"),
)


def upgrade() -> None:
    for table, columns in _IDENTITIES:
        op.execute(f"ALTER TABLE {table} ADD CONSTRAINT uq_{table}_logical UNIQUE ({columns})")


def downgrade() -> None:
    for table, _ in reversed(_IDENTITIES):
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT uq_{table}_logical")
