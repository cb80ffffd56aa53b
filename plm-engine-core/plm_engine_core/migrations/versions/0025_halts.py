"""What a halt ends is in its record: revoked grants, calls in flight, and by when those are to have ended.

Recovery looks for parked runs by every halt scope, and for tenants in which a halt has not ended everything yet.

Revision ID: 0025
Revises: 0024
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

FILES = ("halted_v2",)

HALTS = """
ALTER TABLE halts ADD COLUMN cancel_seconds double precision CHECK (cancel_seconds > 0);
ALTER TABLE halts_system ADD COLUMN cancel_seconds double precision CHECK (cancel_seconds > 0);
ALTER TABLE grants DROP CONSTRAINT grants_state_check,
    ADD CONSTRAINT grants_state_check CHECK (state IN ('issued', 'begun', 'settled', 'revoked'));
CREATE TABLE halt_calls (
    tenant_id uuid    NOT NULL,
    halt_id   uuid    NOT NULL,
    grant_id  uuid    NOT NULL,
    began     boolean NOT NULL,
    PRIMARY KEY (tenant_id, halt_id, grant_id),
    FOREIGN KEY (tenant_id, grant_id) REFERENCES grants (tenant_id, id) ON DELETE CASCADE
);
CREATE INDEX ix_halt_calls_grant ON halt_calls (tenant_id, grant_id);
ALTER TABLE halt_calls ENABLE ROW LEVEL SECURITY;
ALTER TABLE halt_calls FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON halt_calls
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
GRANT SELECT, INSERT ON halt_calls TO plm_engine_writer;
"""

# Enqueuing a run touches `updated_at`, so a run whose job was just enqueued counts as looked after for that long.
IS_ABANDONED = """
CREATE FUNCTION engine_is_abandoned_v3(r run_states, p_patience double precision) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.kind = 'hosted' AND CASE r.state
        WHEN 'queued' THEN r.updated_at <= clock_timestamp() - make_interval(secs => p_patience)
        WHEN 'running' THEN r.lease_expires_at <= clock_timestamp() AND (r.updated_at <= r.lease_expires_at
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
CREATE FUNCTION engine_abandoned_runs_v3(p_limit integer, p_patience double precision)
RETURNS TABLE (tenant_id uuid, run_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.tenant_id, r.run_id FROM run_states AS r
        WHERE r.state IN ('queued', 'running', 'awaiting_approval', 'halted') AND engine_is_abandoned_v3(r, p_patience)
        ORDER BY r.updated_at LIMIT p_limit
$$;
CREATE FUNCTION engine_abandoned_halts_v1(p_limit integer) RETURNS TABLE (tenant_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT DISTINCT r.tenant_id FROM run_states AS r
        JOIN grants AS g ON g.tenant_id = r.tenant_id AND g.run_id = r.run_id
        WHERE r.state = 'running' AND (g.state = 'issued' OR (g.state = 'begun' AND NOT EXISTS (
            SELECT FROM halt_calls AS c WHERE c.tenant_id = g.tenant_id AND c.grant_id = g.id)))
          AND EXISTS (SELECT FROM engine_standing_halts_v2(r.tenant_id))
        LIMIT p_limit
$$;
"""

DEFINERS = ("engine_abandoned_runs_v3(integer, double precision)", "engine_abandoned_halts_v1(integer)")
SIGNATURES = (
    *DEFINERS,
    "engine_is_abandoned_v3(run_states, double precision)",
    "engine_end_halted_v2(uuid)",
    "engine_standing_halts_v2(uuid)",
    "engine_run_halt_v2(uuid, uuid, boolean)",
)
LOOK = (
    "engine_is_abandoned_v3(run_states, double precision)",
    "engine_standing_halts_v2(uuid)",
    "engine_run_halt_v2(uuid, uuid, boolean)",
    "engine_standing_halt_v2(uuid, uuid, uuid, text, text)",
)


def upgrade() -> None:
    op.execute(HALTS)
    folder = files("plm_engine_core") / "control_plane" / "storage" / "sql"
    for name in FILES:
        send_as_written((folder / f"{name}.sql").read_text(encoding="utf-8"))
    op.execute(IS_ABANDONED)
    op.execute(ACROSS_TENANTS)
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")
    op.execute("GRANT SELECT ON run_steps, grants, halt_calls TO plm_migrator")
    for signature in LOOK:
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_migrator")
    op.execute("GRANT CREATE ON SCHEMA public TO plm_migrator")
    for signature in DEFINERS:
        op.execute(f"ALTER FUNCTION {signature} OWNER TO plm_migrator")
    op.execute("REVOKE CREATE ON SCHEMA public FROM plm_migrator")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
    op.execute("REVOKE EXECUTE ON FUNCTION engine_standing_halt_v2(uuid, uuid, uuid, text, text) FROM plm_migrator")
    op.execute("REVOKE SELECT ON run_steps, grants FROM plm_migrator")
    op.execute("DROP TABLE halt_calls")
    op.execute("ALTER TABLE grants NO FORCE ROW LEVEL SECURITY")  # the owner changes rows of every tenant
    op.execute("UPDATE grants SET state = 'issued' WHERE state = 'revoked'")
    op.execute("ALTER TABLE grants FORCE ROW LEVEL SECURITY")
    op.execute(
        "ALTER TABLE grants DROP CONSTRAINT grants_state_check, "
        "ADD CONSTRAINT grants_state_check CHECK (state IN ('issued', 'begun', 'settled'))"
    )
    op.execute("ALTER TABLE halts DROP COLUMN cancel_seconds")
    op.execute("ALTER TABLE halts_system DROP COLUMN cancel_seconds")
