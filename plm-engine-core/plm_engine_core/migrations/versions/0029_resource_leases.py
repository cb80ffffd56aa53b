"""Leases of named resources.

A row stays when its lease is over, so that fencing tokens of a name only grow.

Revision ID: 0029
Revises: 0028
"""

from __future__ import annotations

from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None

RESOURCE_LEASES = """
CREATE TABLE resource_leases (
    tenant_id     uuid        NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    name          text        NOT NULL CHECK (name <> ''),
    owner         text        NOT NULL,
    fencing_token bigint      NOT NULL CHECK (fencing_token >= 1),
    taken_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at    timestamptz,
    PRIMARY KEY (tenant_id, name)
);
ALTER TABLE resource_leases ENABLE ROW LEVEL SECURITY;
ALTER TABLE resource_leases FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON resource_leases
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
GRANT SELECT, INSERT ON resource_leases TO plm_engine_writer;
GRANT UPDATE (owner, fencing_token, taken_at, expires_at) ON resource_leases TO plm_engine_writer;
"""


def upgrade() -> None:
    op.execute(RESOURCE_LEASES)


def downgrade() -> None:
    op.execute("DROP TABLE resource_leases")
