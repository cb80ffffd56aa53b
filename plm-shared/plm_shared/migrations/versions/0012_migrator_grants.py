"""What the migrator group may do: all rows of all tenants, in the seven tables."""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_TABLES = "tenants, runs, telemetry_events, llm_calls, connector_calls, artifacts, pricing_snapshots"


def upgrade() -> None:
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {_TABLES} TO plm_migrator")


def downgrade() -> None:
    op.execute(f"REVOKE SELECT, INSERT, UPDATE, DELETE ON {_TABLES} FROM plm_migrator")
