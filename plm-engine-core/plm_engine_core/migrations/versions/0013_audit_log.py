"""The audit log: who authenticated, when, and who was refused. Written once, changed by nobody.

The triggers hold for every role, the owner and superusers included; only dropping the table (the downgrade) removes
rows. The foreign key therefore has no ON DELETE action: a tenant that has audit rows cannot be deleted.
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = None
branch_labels = None
depends_on = None

_MINE = "tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid"


def upgrade() -> None:
    # Roles belong to the whole cluster: made by `provision`, and here where a superuser runs this on a bare database.
    op.execute(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'plm_engine_writer') "
        "THEN CREATE ROLE plm_engine_writer NOLOGIN; END IF; END $$"
    )
    op.execute("GRANT USAGE ON SCHEMA public TO plm_engine_writer")
    op.execute(
        """
        CREATE TABLE audit_log (
            tenant_id uuid NOT NULL REFERENCES tenants (id),
            id uuid NOT NULL,
            user_id uuid,
            actor_kind actor_kind NOT NULL,
            event_type text NOT NULL CHECK (event_type <> ''),
            payload jsonb NOT NULL DEFAULT '{}',
            created_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (tenant_id, id)
        )
        """
    )
    op.execute("CREATE INDEX ix_audit_log_tenant_created ON audit_log (tenant_id, created_at DESC)")
    op.execute(
        """
        CREATE FUNCTION audit_log_refuse_change() RETURNS trigger
        LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
        BEGIN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', CONSTRAINT = 'audit_log_append_only',
                MESSAGE = format('audit_log is append-only: %s is refused', TG_OP);
        END
        $$
        """
    )
    op.execute(
        "CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE ON audit_log "
        "FOR EACH ROW EXECUTE FUNCTION audit_log_refuse_change()"
    )
    op.execute(
        "CREATE TRIGGER audit_log_no_truncate BEFORE TRUNCATE ON audit_log "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_log_refuse_change()"
    )
    for trigger in ("audit_log_append_only", "audit_log_no_truncate"):
        # ALWAYS: an ordinary trigger would rest while session_replication_role is 'replica'.
        op.execute(f"ALTER TABLE audit_log ENABLE ALWAYS TRIGGER {trigger}")
    op.execute("ALTER TABLE audit_log ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE audit_log FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY tenant_isolation ON audit_log USING ({_MINE}) WITH CHECK ({_MINE})")
    op.execute("REVOKE ALL ON audit_log FROM PUBLIC")
    op.execute("GRANT SELECT, INSERT ON audit_log TO plm_engine_writer")
    op.execute("GRANT SELECT ON tenants TO plm_engine_writer")


def downgrade() -> None:
    # The role stays: it belongs to the cluster, and another database may rely on it.
    op.execute("DROP TABLE audit_log")
    op.execute("DROP FUNCTION audit_log_refuse_change()")
    op.execute("REVOKE SELECT ON tenants FROM plm_engine_writer")
    op.execute("REVOKE USAGE ON SCHEMA public FROM plm_engine_writer")
