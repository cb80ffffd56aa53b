"""The sweeper also finds runs of kind `external` that their holder left, or that are parked for nothing.

Revision ID: 0026
Revises: 0025
"""

from __future__ import annotations

from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None

# Enqueuing a run touches `updated_at`, so a run whose job was just enqueued counts as looked after for that long.
# Nobody delivers a run of kind `external`, so only what is parked for nothing counts.
IS_ABANDONED = """
CREATE FUNCTION engine_is_abandoned_v4(r run_states, p_patience double precision) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT CASE r.state
        WHEN 'queued' THEN r.kind = 'hosted' AND r.updated_at <= clock_timestamp() - make_interval(secs => p_patience)
        WHEN 'running' THEN r.kind = 'hosted' AND r.lease_expires_at <= clock_timestamp()
            AND (r.updated_at <= r.lease_expires_at
                OR r.updated_at <= clock_timestamp() - make_interval(secs => p_patience))
        WHEN 'awaiting_approval' THEN NOT EXISTS (SELECT FROM approval_tickets AS t
            WHERE t.tenant_id = r.tenant_id AND t.run_id = r.run_id
                AND t.state = 'pending' AND t.deadline > clock_timestamp())
        WHEN 'halted' THEN engine_run_halt_v2(r.tenant_id, r.run_id, false) IS NULL
        ELSE false END
$$
"""

# Ids only; whoever acts on them does so tenant by tenant under row-level security.
ACROSS_TENANTS = """
CREATE FUNCTION engine_abandoned_runs_v4(p_limit integer, p_patience double precision)
RETURNS TABLE (tenant_id uuid, run_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.tenant_id, r.run_id FROM run_states AS r
        WHERE r.state IN ('queued', 'running', 'awaiting_approval', 'halted') AND engine_is_abandoned_v4(r, p_patience)
        ORDER BY r.updated_at LIMIT p_limit
$$;
CREATE FUNCTION engine_orphaned_runs_v1(p_limit integer, p_forsaken double precision)
RETURNS TABLE (tenant_id uuid, run_id uuid, fencing_token bigint, forsaken boolean)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.tenant_id, r.run_id, r.fencing_token, r.state = 'queued' AND f.forsaken FROM run_states AS r
        CROSS JOIN LATERAL (
            SELECT r.updated_at <= clock_timestamp() - make_interval(secs => p_forsaken) AS forsaken) AS f
        WHERE r.kind = 'external' AND r.state IN ('queued', 'running')
          AND ((r.state = 'running' AND r.lease_expires_at <= clock_timestamp())
            OR (r.state = 'queued' AND (f.forsaken OR EXISTS (SELECT FROM grants AS g
                WHERE g.tenant_id = r.tenant_id AND g.run_id = r.run_id AND g.state <> 'settled'))))
        ORDER BY r.updated_at LIMIT p_limit
$$;
"""

DEFINERS = ("engine_abandoned_runs_v4(integer, double precision)", "engine_orphaned_runs_v1(integer, double precision)")
LOOK = "engine_is_abandoned_v4(run_states, double precision)"
SIGNATURES = (*DEFINERS, LOOK)


def upgrade() -> None:
    op.execute(IS_ABANDONED)
    op.execute(ACROSS_TENANTS)
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")
    op.execute(f"GRANT EXECUTE ON FUNCTION {LOOK} TO plm_migrator")
    op.execute("GRANT CREATE ON SCHEMA public TO plm_migrator")
    for signature in DEFINERS:
        op.execute(f"ALTER FUNCTION {signature} OWNER TO plm_migrator")
    op.execute("REVOKE CREATE ON SCHEMA public FROM plm_migrator")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
