"""Who decides a ticket may say as which revision it was read, and is refused when it is another now.

Only the check of a vote is replaced: who says nothing, as nodes of the release before do, is not asked.

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

REVISION = "engine_ticket_revision_v1(approval_tickets)"

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    send_as_written((_FOLDER / "refused_vote_v3_as_read.sql").read_text(encoding="utf-8"))
    op.execute(f"REVOKE ALL ON FUNCTION {REVISION} FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION {REVISION} TO plm_engine_writer")


def downgrade() -> None:
    text = (_FOLDER / "tickets_v3_with_asks.sql").read_text(encoding="utf-8")
    pattern = r"CREATE OR REPLACE FUNCTION engine_refused_vote_v3\(.*?\n\$\$;"
    (before,) = re.findall(pattern, text, re.DOTALL)
    send_as_written(before)
    op.execute(f"DROP FUNCTION {REVISION}")
