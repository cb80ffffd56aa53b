"""Pricing snapshots: which price was in force for a model on a day.

The cost guard now covers the link to the snapshot as well; only the link of a deleted snapshot may still be cleared.
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_CALLS = ("llm_calls", "connector_calls")
_MINE = "tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid"
_GUARD = """
CREATE OR REPLACE FUNCTION guard_cost_status() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF OLD.cost_status <> 'pending' AND (
        (NEW.cost_status, NEW.cost_eur, NEW.pricing_version)
            IS DISTINCT FROM (OLD.cost_status, OLD.cost_eur, OLD.pricing_version){changed}
    ) THEN
        RAISE EXCEPTION '%_cost_once: the cost is % and final', TG_TABLE_NAME, OLD.cost_status
            USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, CONSTRAINT = TG_TABLE_NAME || '_cost_once';
    END IF;
    RETURN NEW;
END
$$
"""
_LINK_CHANGED = """
        OR NEW.pricing_snapshot_id IS DISTINCT FROM OLD.pricing_snapshot_id AND (
            NEW.pricing_snapshot_id IS NOT NULL
            OR EXISTS (SELECT FROM public.pricing_snapshots AS s WHERE s.id = OLD.pricing_snapshot_id)
        )"""


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE pricing_snapshots (
            id uuid PRIMARY KEY,
            tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
            model text NOT NULL,
            snapshot_date date NOT NULL,
            input_rate_per_1k numeric(18, 8),
            output_rate_per_1k numeric(18, 8),
            pricing_version text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT uq_pricing_snapshots_tenant_model_date UNIQUE (tenant_id, model, snapshot_date)
        )
        """
    )
    op.execute("CREATE INDEX ix_pricing_snapshots_tenant_id ON pricing_snapshots (tenant_id)")
    op.execute("ALTER TABLE pricing_snapshots ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE pricing_snapshots FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY tenant_isolation ON pricing_snapshots USING ({_MINE}) WITH CHECK ({_MINE})")
    op.execute("GRANT SELECT, INSERT ON pricing_snapshots TO plm_kernel_writer")
    for table in _CALLS:
        op.execute(
            f"ALTER TABLE {table} ADD COLUMN pricing_snapshot_id uuid "
            "REFERENCES pricing_snapshots (id) ON DELETE SET NULL"
        )
        op.execute(f"CREATE INDEX ix_{table}_pricing_snapshot_id ON {table} (pricing_snapshot_id)")
        op.execute(f"GRANT UPDATE (pricing_snapshot_id) ON {table} TO plm_kernel_writer")
    op.execute(_GUARD.format(changed=_LINK_CHANGED))


def downgrade() -> None:
    op.execute(_GUARD.format(changed=""))
    for table in reversed(_CALLS):
        op.execute(f"ALTER TABLE {table} DROP COLUMN pricing_snapshot_id")
    op.execute("DROP TABLE pricing_snapshots")
