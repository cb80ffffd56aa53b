"""Exports that were stored, how long a tenant keeps its events, and what stays behind of those that went.

Revision ID: 0023
Revises: 0022
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE event_exports (
    tenant_id   uuid        NOT NULL,
    number      bigint      NOT NULL,
    after       bigint      NOT NULL CHECK (after >= 0),
    uri         text        NOT NULL CHECK (uri <> ''),
    size_bytes  bigint      NOT NULL CHECK (size_bytes >= 0),
    sha256      text        NOT NULL CHECK (sha256 <> ''),
    exported_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, number),
    FOREIGN KEY (tenant_id, number) REFERENCES event_checkpoints (tenant_id, number) ON DELETE CASCADE,
    CHECK (after < number)
);
CREATE TABLE event_retention (
    tenant_id uuid        NOT NULL PRIMARY KEY REFERENCES tenants (id) ON DELETE CASCADE,
    keep      interval    NOT NULL CHECK (keep >= interval '1 day'),
    set_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE event_stubs (
    tenant_id uuid        NOT NULL,
    stream    text        NOT NULL,
    number    bigint      NOT NULL,
    last_seq  bigint      NOT NULL CHECK (last_seq >= 1),
    last_hash bytea       NOT NULL,
    pruned_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, stream, last_seq),
    FOREIGN KEY (tenant_id, stream, number) REFERENCES event_checkpoint_heads (tenant_id, stream, number)
        ON DELETE CASCADE
);
CREATE INDEX ix_event_stubs_head ON event_stubs (tenant_id, stream, number);
GRANT SELECT, INSERT ON event_exports TO plm_engine_writer;
GRANT SELECT ON event_retention, event_stubs TO plm_engine_writer;
"""
TENANT_TABLES = ("event_exports", "event_retention", "event_stubs")
APPEND_ONLY = ("event_exports", "event_stubs")

GUARDS = """
CREATE FUNCTION engine_check_stub() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM event_checkpoint_heads AS h WHERE h.tenant_id = NEW.tenant_id AND h.stream = NEW.stream
                   AND h.number = NEW.number AND h.last_seq = NEW.last_seq AND h.last_hash = NEW.last_hash)
       AND EXISTS (SELECT FROM event_exports AS x WHERE x.tenant_id = NEW.tenant_id AND x.number >= NEW.number) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'check_violation', CONSTRAINT = 'event_stubs_covered',
        MESSAGE = format('no exported checkpoint covers %s up to event %s', NEW.stream, NEW.last_seq);
END
$$;
CREATE TRIGGER event_stubs_covered BEFORE INSERT ON event_stubs FOR EACH ROW EXECUTE FUNCTION engine_check_stub();
ALTER TABLE event_stubs ENABLE ALWAYS TRIGGER event_stubs_covered;
CREATE FUNCTION engine_refuse_change_of_event() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' AND EXISTS (SELECT FROM event_stubs AS s WHERE s.tenant_id = OLD.tenant_id
            AND s.stream = OLD.stream AND s.last_seq >= OLD.seq) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'check_violation', CONSTRAINT = 'events_append_only',
        MESSAGE = format('events is append-only: %s is refused', TG_OP);
END
$$;
"""
REPLACE_TRIGGER = """
DROP TRIGGER events_append_only ON events;
CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE ON events
    FOR EACH ROW EXECUTE FUNCTION {}();
ALTER TABLE events ENABLE ALWAYS TRIGGER events_append_only;
"""
PRUNE = "engine_prune_events_v1(uuid, text)"


def upgrade() -> None:
    op.execute(TABLES)
    for table in TENANT_TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant_isolation ON {table} "
            "USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid) "
            "WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)"
        )
    for table in APPEND_ONLY:
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
    op.execute(GUARDS)
    op.execute(REPLACE_TRIGGER.format("engine_refuse_change_of_event"))
    text = (files("plm_engine_core") / "control_plane" / "storage" / "sql" / "prune_events_v1.sql").read_text("utf-8")
    send_as_written(text)
    op.execute(f"REVOKE ALL ON FUNCTION {PRUNE} FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION {PRUNE} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {PRUNE}")
    op.execute(REPLACE_TRIGGER.format("engine_refuse_change"))
    op.execute("DROP TABLE event_stubs, event_retention, event_exports")
    op.execute("DROP FUNCTION engine_refuse_change_of_event(), engine_check_stub()")
