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

# Ids only; whoever acts on them does so tenant by tenant under row-level security. A queued run is given half a minute
# before its drive job counts as lost.
FUNCTION = """
CREATE FUNCTION engine_abandoned_runs_v1(p_limit integer) RETURNS TABLE (tenant_id uuid, run_id uuid)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    (SELECT s.tenant_id, s.run_id FROM run_states AS s
        WHERE (s.state = 'running' AND s.lease_expires_at <= clock_timestamp())
           OR (s.state = 'queued' AND s.updated_at <= clock_timestamp() - interval '30 seconds') LIMIT p_limit)
    UNION
    (SELECT t.tenant_id, t.run_id FROM approval_tickets AS t
        WHERE t.state = 'pending' AND t.deadline <= clock_timestamp() LIMIT p_limit)
    LIMIT p_limit
$$
"""


def upgrade() -> None:
    op.execute("GRANT SELECT ON run_states, approval_tickets TO plm_migrator")
    op.execute(FUNCTION)
    # The owner is subject to row-level security like everyone; the migrator role exists to see across tenants.
    op.execute("GRANT CREATE ON SCHEMA public TO plm_migrator")
    op.execute("ALTER FUNCTION engine_abandoned_runs_v1(integer) OWNER TO plm_migrator")
    op.execute("REVOKE CREATE ON SCHEMA public FROM plm_migrator")
    op.execute("REVOKE ALL ON FUNCTION engine_abandoned_runs_v1(integer) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION engine_abandoned_runs_v1(integer) TO plm_engine_writer")


def downgrade() -> None:
    op.execute("DROP FUNCTION engine_abandoned_runs_v1(integer)")
    op.execute("REVOKE SELECT ON run_states, approval_tickets FROM plm_migrator")
