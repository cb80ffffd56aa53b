"""The one look across tenants: which runs nobody drives although somebody should.

Revision ID: 0016
Revises: 0015
"""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

# Enqueuing a run touches `updated_at`, so a run whose job was just enqueued counts as looked after for half a minute.
IS_ABANDONED = """
CREATE FUNCTION engine_is_abandoned_v1(r run_states) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.kind = 'hosted' AND CASE r.state
        WHEN 'queued' THEN r.updated_at <= clock_timestamp() - interval '30 seconds'
        WHEN 'running' THEN r.lease_expires_at <= clock_timestamp()
            AND (r.updated_at <= r.lease_expires_at OR r.updated_at <= clock_timestamp() - interval '30 seconds')
        WHEN 'awaiting_approval' THEN NOT EXISTS (SELECT FROM approval_tickets AS t
            WHERE t.tenant_id = r.tenant_id AND t.run_id = r.run_id
                AND t.state = 'pending' AND t.deadline > clock_timestamp())
        WHEN 'halted' THEN engine_standing_halt_v1(r.tenant_id, r.run_id) IS NULL
        ELSE false END
$$
"""

# Ids only; whoever acts on them does so tenant by tenant under row-level security.
ABANDONED = """
CREATE FUNCTION engine_abandoned_runs_v1(p_limit integer) RETURNS TABLE (tenant_id uuid, run_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.tenant_id, r.run_id FROM run_states AS r
        WHERE r.state IN ('queued', 'running', 'awaiting_approval', 'halted') AND engine_is_abandoned_v1(r)
        ORDER BY r.updated_at LIMIT p_limit
$$
"""

GRANT_READING = "GRANT SELECT ON run_states, approval_tickets, halts, halts_system TO plm_migrator"
REVOKE_READING = "REVOKE SELECT ON run_states, approval_tickets, halts, halts_system FROM plm_migrator"


def upgrade() -> None:
    op.execute(IS_ABANDONED)
    op.execute(ABANDONED)
    # The owner is subject to row-level security like everyone; the migrator role exists to see across tenants.
    op.execute(GRANT_READING)
    op.execute("GRANT EXECUTE ON FUNCTION engine_standing_halt_v1(uuid, uuid) TO plm_migrator")
    for signature in ("engine_is_abandoned_v1(run_states)", "engine_abandoned_runs_v1(integer)"):
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")
    op.execute("GRANT EXECUTE ON FUNCTION engine_is_abandoned_v1(run_states) TO plm_migrator")
    op.execute("GRANT CREATE ON SCHEMA public TO plm_migrator")
    op.execute("ALTER FUNCTION engine_abandoned_runs_v1(integer) OWNER TO plm_migrator")
    op.execute("REVOKE CREATE ON SCHEMA public FROM plm_migrator")


def downgrade() -> None:
    op.execute("DROP FUNCTION engine_abandoned_runs_v1(integer)")
    op.execute("DROP FUNCTION engine_is_abandoned_v1(run_states)")
    op.execute("REVOKE EXECUTE ON FUNCTION engine_standing_halt_v1(uuid, uuid) FROM plm_migrator")
    op.execute(REVOKE_READING)
