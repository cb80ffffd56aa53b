"""Events are pruned in batches, so that no reader of a feed waits for more than one of them.

Version 2 of the function stays for nodes that are not upgraded yet; each leaves to the other no more than there is.

Revision ID: 0041
Revises: 0040
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0041"
down_revision = "0040"
branch_labels = None
depends_on = None

# One row of each tenant whose pruning is between two batches: it goes up to the checkpoint `number`, has looked at
# every event up to (`stream`, `seq`), and took `streams` and `events` not told of yet; `told` says whether any are.
TABLE = """
CREATE TABLE event_prunings (
    tenant_id uuid        NOT NULL PRIMARY KEY REFERENCES tenants (id) ON DELETE CASCADE,
    number    bigint      NOT NULL,
    keep      interval    NOT NULL,
    stream    text        NOT NULL,
    seq       bigint      NOT NULL,
    streams   bigint      NOT NULL CHECK (streams >= 0),
    events    bigint      NOT NULL CHECK (events >= 0),
    told      boolean     NOT NULL,
    begun_at  timestamptz NOT NULL
);
GRANT SELECT ON event_prunings TO plm_engine_writer;
ALTER TABLE event_prunings ENABLE ROW LEVEL SECURITY;
ALTER TABLE event_prunings FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON event_prunings
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
"""
PRUNE = "engine_prune_events_v3(uuid, text, integer)"


def upgrade() -> None:
    op.execute(TABLE)
    text = (files("plm_engine_core") / "control_plane" / "storage" / "sql" / "prune_events_v3.sql").read_text("utf-8")
    send_as_written(text)
    op.execute(f"REVOKE ALL ON FUNCTION {PRUNE} FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION {PRUNE} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {PRUNE}")
    op.execute("DROP TABLE event_prunings")
