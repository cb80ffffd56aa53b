"""Windows of budgets are counted in the time zone that the policy says, and an opened one stays until its own end.

Two functions are replaced, for nodes of every release that calls them: of a command without a zone their contract is as
before. Taken back, windows of other zones are not found any more, and each budget of one begins anew in UTC.

Revision ID: 0049
Revises: 0048
"""

from __future__ import annotations

import re
from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0049"
down_revision = "0048"
branch_labels = None
depends_on = None

NEW = (
    "engine_midnight_v1(timestamp, text)",
    "engine_window_of_v1(text, text, timestamptz)",
    "engine_window_runs_v1(timestamptz, text, timestamptz, timestamptz)",
    "engine_window_in_use_v1(uuid, jsonb, timestamptz)",
    "engine_open_window_v1(uuid, jsonb)",
    "engine_unknown_zone_v1(jsonb)",
)

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    op.execute("ALTER TABLE budgets ADD COLUMN ends_at timestamptz, ADD COLUMN time_zone text")
    op.execute("GRANT UPDATE (ends_at, time_zone) ON budgets TO plm_engine_writer")
    for name in ("windows_v1", "unaffordable_v2_in_zones", "reserve_v4_in_zones"):
        send_as_written((_FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in NEW:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    send_as_written((_FOLDER / "reserve_v4_in_force.sql").read_text(encoding="utf-8"))
    text = (_FOLDER / "budgets_v2.sql").read_text(encoding="utf-8")
    (before,) = re.findall(r"CREATE (FUNCTION engine_unaffordable_v2\(.*?\n\$\$;)", text, re.DOTALL)
    send_as_written(f"CREATE OR REPLACE {before}")
    for signature in reversed(NEW):
        op.execute(f"DROP FUNCTION {signature}")
    op.execute("ALTER TABLE budgets DROP COLUMN ends_at, DROP COLUMN time_zone")
