"""The writer and migrator groups and the writer's grants.

Roles belong to the whole cluster, so they are made only where absent, also when the migration of another database makes
them at the same time; the downgrade drops them only when no database
and no member needs them any more, and when it may.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_ROLES = ("plm_kernel_writer", "plm_migrator")
_COST = "cost_eur, cost_status, pricing_version"
_GRANTS = (
    ("SELECT", "tenants"),
    ("SELECT, INSERT, UPDATE (quality_level, updated_at)", "runs"),
    ("SELECT, INSERT", "telemetry_events"),
    (f"SELECT, INSERT, UPDATE ({_COST})", "llm_calls"),
    (f"SELECT, INSERT, UPDATE ({_COST})", "connector_calls"),
    ("SELECT, INSERT, UPDATE (retention_until)", "artifacts"),
    ("SELECT", "mcrc_v1_view"),
)


def upgrade() -> None:
    for role in _ROLES:
        op.execute(
            f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') "
            f"THEN CREATE ROLE {role} NOLOGIN; END IF; "
            "EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"
        )
        op.execute(f"GRANT USAGE ON SCHEMA public TO {role}")
    for rights, table in _GRANTS:
        op.execute(f"GRANT {rights} ON {table} TO plm_kernel_writer")


def downgrade() -> None:
    for rights, table in reversed(_GRANTS):
        op.execute(f"REVOKE {rights} ON {table} FROM plm_kernel_writer")
    for role in reversed(_ROLES):
        op.execute(f"REVOKE USAGE ON SCHEMA public FROM {role}")
        op.execute(
            f"""
            DO $$ BEGIN
                IF NOT EXISTS (SELECT FROM pg_auth_members WHERE roleid = '{role}'::regrole) THEN
                    DROP ROLE {role};
                END IF;
            EXCEPTION WHEN dependent_objects_still_exist OR insufficient_privilege THEN
                RAISE NOTICE '{role} stays: %', SQLERRM;
            END $$
            """
        )
