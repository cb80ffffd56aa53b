"""A stub says where in the feed the last event that went had stood, so that a reader who missed it is told.

Revision ID: 0030
Revises: 0029
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None

# Stubs that are there already count as made now, by this transaction. Where their events stood is not known any more,
# so the end of their stream stands for it: a reader may be told once too often, never too seldom.
COLUMNS = """
ALTER TABLE event_stubs ADD COLUMN last_position xid8, ADD COLUMN pruned_in xid8 NOT NULL DEFAULT pg_current_xact_id();
"""
PRUNE = "engine_prune_events_v2(uuid, text)"


def upgrade() -> None:
    op.execute(COLUMNS)
    text = (files("plm_engine_core") / "control_plane" / "storage" / "sql" / "prune_events_v2.sql").read_text("utf-8")
    send_as_written(text)
    op.execute(f"REVOKE ALL ON FUNCTION {PRUNE} FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION {PRUNE} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {PRUNE}")
    op.execute("ALTER TABLE event_stubs DROP COLUMN last_position, DROP COLUMN pruned_in")
