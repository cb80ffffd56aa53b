"""Calls of language models, with their cost."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE TYPE cost_status AS ENUM ('pending', 'calculated', 'unavailable')")
    op.execute(
        """
        CREATE TABLE llm_calls (
            id uuid PRIMARY KEY,
            tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
            run_id uuid REFERENCES runs (id) ON DELETE SET NULL,
            span_id text NOT NULL,
            model text NOT NULL,
            prompt_tokens integer NOT NULL,
            completion_tokens integer NOT NULL,
            cost_eur numeric(18, 8),
            cost_status cost_status NOT NULL DEFAULT 'pending',
            pricing_version text NOT NULL,
            idempotency_key text NOT NULL UNIQUE,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute("CREATE INDEX ix_llm_calls_run_id ON llm_calls (run_id)")


def downgrade() -> None:
    op.execute("DROP TABLE llm_calls")
    op.execute("DROP TYPE cost_status")
