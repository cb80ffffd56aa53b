"""Signed checkpoints over the heads of a tenant's event streams.

Revision ID: 0019
Revises: 0018
"""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

CHECKPOINTS = """
CREATE TABLE event_checkpoints (
    tenant_id uuid        NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    number    bigint      NOT NULL CHECK (number >= 1),
    taken_at  timestamptz NOT NULL,
    streams   bigint      NOT NULL CHECK (streams >= 0),
    root      bytea       NOT NULL,
    previous  bytea       NOT NULL,
    key_id    text        NOT NULL CHECK (key_id <> ''),
    signature bytea       NOT NULL,
    PRIMARY KEY (tenant_id, number)
);
CREATE TABLE event_checkpoint_heads (
    tenant_id uuid   NOT NULL,
    number    bigint NOT NULL,
    stream    text   NOT NULL,
    last_seq  bigint NOT NULL,
    last_hash bytea  NOT NULL,
    PRIMARY KEY (tenant_id, stream, number),
    FOREIGN KEY (tenant_id, number) REFERENCES event_checkpoints (tenant_id, number) ON DELETE CASCADE
);
CREATE INDEX ix_event_checkpoint_heads_number ON event_checkpoint_heads (tenant_id, number);
"""

TABLES = ("event_checkpoints", "event_checkpoint_heads")


def upgrade() -> None:
    op.execute(CHECKPOINTS)
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant_isolation ON {table} "
            "USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid) "
            "WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)"
        )
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION engine_refuse_change()"
        )
        op.execute(
            f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION engine_refuse_change()"
        )
        op.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_append_only")
        op.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_no_truncate")
    op.execute(f"GRANT SELECT, INSERT ON {', '.join(TABLES)} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"DROP TABLE {', '.join(reversed(TABLES))}")
