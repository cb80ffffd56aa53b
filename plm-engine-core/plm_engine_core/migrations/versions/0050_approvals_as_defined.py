"""An approval scope covers calls of a capability as it was defined when somebody was asked, like a ticket.

Two functions are replaced, for nodes of every release that calls them: every admission describes the capability that
was decided on, and so has the event of every question. Taken back, a ticket is held against it by the nodes that do so
themselves, and an approval scope by none.

Revision ID: 0050
Revises: 0049
"""

from __future__ import annotations

import re
from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0050"
down_revision = "0049"
branch_labels = None
depends_on = None

NEW = ("engine_asked_for_v1(uuid, uuid, uuid)", "engine_calls_alike_v1(jsonb, jsonb)")
REPLACED = ("engine_ticket_v2", "engine_approval_scope_v2")

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    send_as_written((_FOLDER / "tickets_v2_as_defined.sql").read_text(encoding="utf-8"))
    for signature in NEW:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    text = (_FOLDER / "tickets_v2.sql").read_text(encoding="utf-8")
    for name in REPLACED:
        (before,) = re.findall(rf"CREATE (FUNCTION {name}\(.*?\n\$\$;)", text, re.DOTALL)
        send_as_written(f"CREATE OR REPLACE {before}")
    for signature in NEW:
        op.execute(f"DROP FUNCTION {signature}")
