"""Policies by digest, and who gave which one its role, when and why.

Both belong to the whole system, as its halts do: one policy decides for all tenants. Nothing of them is ever changed or
removed, and the database itself holds a content to its digest.

Revision ID: 0024
Revises: 0023
"""

from __future__ import annotations

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

POLICIES = """
CREATE TABLE policy_versions (
    digest    text        NOT NULL PRIMARY KEY
              CHECK (digest = encode(sha256(convert_to(content, 'UTF8')), 'hex')),
    version   text        NOT NULL CHECK (version <> ''),
    content   text        NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE policy_activations (
    number       bigint      NOT NULL PRIMARY KEY CHECK (number >= 1),
    role         text        NOT NULL CHECK (role IN ('active', 'shadow')),
    digest       text        REFERENCES policy_versions (digest),
    previous     text,
    reason       text        NOT NULL CHECK (reason <> ''),
    activated_by uuid        NOT NULL,
    activated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK (digest IS NOT NULL OR role = 'shadow')
);
CREATE INDEX ix_policy_activations_role ON policy_activations (role, number DESC);
CREATE INDEX ix_policy_activations_digest ON policy_activations (digest);
"""

TABLES = ("policy_versions", "policy_activations")


def upgrade() -> None:
    op.execute(POLICIES)
    for table in TABLES:
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
