"""How long an enqueued run may wait before its job counts as lost is said by who asks, not by the schema.

Revision ID: 0017
Revises: 0016

The functions of 0016 stay for run workers of the release before, which may still be running beside this one.
"""

from __future__ import annotations

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

# Enqueuing a run touches `updated_at`, so a run whose job was just enqueued counts as looked after for that long.
IS_ABANDONED = """
CREATE FUNCTION engine_is_abandoned_v2(r run_states, p_patience double precision) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.kind = 'hosted' AND CASE r.state
        WHEN 'queued' THEN r.updated_at <= clock_timestamp() - make_interval(secs => p_patience)
        WHEN 'running' THEN r.lease_expires_at <= clock_timestamp() AND (r.updated_at <= r.lease_expires_at
            OR r.updated_at <= clock_timestamp() - make_interval(secs => p_patience))
        WHEN 'awaiting_approval' THEN NOT EXISTS (SELECT FROM approval_tickets AS t
            WHERE t.tenant_id = r.tenant_id AND t.run_id = r.run_id
                AND t.state = 'pending' AND t.deadline > clock_timestamp())
        WHEN 'halted' THEN engine_standing_halt_v1(r.tenant_id, r.run_id) IS NULL
        ELSE false END
$$
"""

# Ids only; whoever acts on them does so tenant by tenant under row-level security.
ABANDONED = """
CREATE FUNCTION engine_abandoned_runs_v2(p_limit integer, p_patience double precision)
RETURNS TABLE (tenant_id uuid, run_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.tenant_id, r.run_id FROM run_states AS r
        WHERE r.state IN ('queued', 'running', 'awaiting_approval', 'halted') AND engine_is_abandoned_v2(r, p_patience)
        ORDER BY r.updated_at LIMIT p_limit
$$
"""

SIGNATURES = (
    "engine_is_abandoned_v2(run_states, double precision)",
    "engine_abandoned_runs_v2(integer, double precision)",
)


def upgrade() -> None:
    op.execute(IS_ABANDONED)
    op.execute(ABANDONED)
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")
    op.execute(f"GRANT EXECUTE ON FUNCTION {SIGNATURES[0]} TO plm_migrator")
    op.execute("GRANT CREATE ON SCHEMA public TO plm_migrator")
    op.execute(f"ALTER FUNCTION {SIGNATURES[1]} OWNER TO plm_migrator")
    op.execute("REVOKE CREATE ON SCHEMA public FROM plm_migrator")


def downgrade() -> None:
    for signature in reversed(SIGNATURES):
        op.execute(f"DROP FUNCTION {signature}")
