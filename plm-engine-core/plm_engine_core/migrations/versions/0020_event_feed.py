"""Each event gets its place in the feed over all streams of a tenant.

Revision ID: 0020
Revises: 0019

The appending function keeps its name and contract, and only fills the new columns: workers of the release before, which
may still run, append through it too, and an event of theirs without its place would be missing from the feed. Events
that are there already come first in the feed, stream by stream.
"""

from __future__ import annotations

import re
from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

# A constant default first, so that no row is rewritten.
COLUMNS = """
ALTER TABLE events ADD COLUMN feed_position xid8 NOT NULL DEFAULT '0';
ALTER TABLE events ALTER COLUMN feed_position SET DEFAULT pg_current_xact_id();
ALTER TABLE event_streams ADD COLUMN last_position xid8 NOT NULL DEFAULT '0';
CREATE INDEX ix_events_feed ON events (tenant_id, feed_position);
GRANT UPDATE (last_position) ON event_streams TO plm_engine_writer;
"""
DROP_COLUMNS = """
DROP INDEX ix_events_feed;
ALTER TABLE events DROP COLUMN feed_position;
ALTER TABLE event_streams DROP COLUMN last_position;
"""

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"
_BEFORE = re.compile(r"CREATE (FUNCTION engine_append_event_v1\(.*?\n\$\$;)", re.DOTALL)


def upgrade() -> None:
    op.execute(COLUMNS)
    send_as_written((_FOLDER / "append_event_v1_in_feed.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    (before,) = _BEFORE.findall((_FOLDER / "common_v1.sql").read_text(encoding="utf-8"))
    send_as_written(f"CREATE OR REPLACE {before}")
    op.execute(DROP_COLUMNS)
