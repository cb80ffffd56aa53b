"""Idempotency records of runs that ended go after a while; those that stand by themselves stay.

The runs that ended are walked in the order in which they did, so nothing is added to what an admission writes. A run
keeps the key that made it, by which the record of its creation is found; of a run that an earlier release made, or a
node of one still makes, that record stays.

Revision ID: 0046
Revises: 0045
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0046"
down_revision = "0045"
branch_labels = None
depends_on = None

TABLE = """
ALTER TABLE run_states ADD COLUMN idempotency_key text;
CREATE INDEX ix_run_states_ended ON run_states (tenant_id, finished_at, run_id) WHERE finished_at IS NOT NULL;
CREATE TABLE idempotency_expiries (
    tenant_id   uuid        NOT NULL PRIMARY KEY REFERENCES tenants (id) ON DELETE CASCADE,
    finished_at timestamptz NOT NULL,
    run_id      uuid        NOT NULL
);
GRANT SELECT ON idempotency_expiries TO plm_engine_writer;
ALTER TABLE idempotency_expiries ENABLE ROW LEVEL SECURITY;
ALTER TABLE idempotency_expiries FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON idempotency_expiries
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
"""
EXPIRE = "engine_expire_records_v1(uuid, double precision, integer)"


def upgrade() -> None:
    op.execute(TABLE)
    folder = files("plm_engine_core") / "control_plane" / "storage" / "sql"
    send_as_written((folder / "expire_records_v1.sql").read_text(encoding="utf-8"))
    op.execute(f"REVOKE ALL ON FUNCTION {EXPIRE} FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION {EXPIRE} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {EXPIRE}")
    op.execute("DROP TABLE idempotency_expiries")
    op.execute("DROP INDEX ix_run_states_ended")
    op.execute("ALTER TABLE run_states DROP COLUMN idempotency_key")
