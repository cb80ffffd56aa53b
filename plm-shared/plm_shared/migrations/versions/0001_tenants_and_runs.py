"""Tenants, runs, and the two enums that describe a run."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE TYPE quality_level AS ENUM ('pending', 'bronze', 'silver', 'gold')")
    op.execute("CREATE TYPE actor_kind AS ENUM ('human', 'agent', 'system')")
    op.execute(
        """
        CREATE TABLE tenants (
            id uuid PRIMARY KEY,
            name text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute(
        """
        CREATE TABLE runs (
            id uuid PRIMARY KEY,
            tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
            quality_level quality_level NOT NULL DEFAULT 'pending',
            actor_kind actor_kind NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz
        )
        """
    )
    op.execute("CREATE INDEX ix_runs_tenant_id ON runs (tenant_id)")


def downgrade() -> None:
    op.execute("DROP TABLE runs")
    op.execute("DROP TABLE tenants")
    op.execute("DROP TYPE actor_kind")
    op.execute("DROP TYPE quality_level")
