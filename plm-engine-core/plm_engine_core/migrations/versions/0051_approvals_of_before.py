"""An approval of before an upgrade stands: a definition that was stored in full is like the same one that was not.

One function is replaced. Taken back, those approvals count alone that were asked for since definitions are stored
without what is as by default.

Revision ID: 0051
Revises: 0050
"""

from __future__ import annotations

import re
from importlib.resources import files

from plm_shared.migrations.chain import send_as_written

revision = "0051"
down_revision = "0050"
branch_labels = None
depends_on = None

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    send_as_written((_FOLDER / "calls_alike_v1_in_full.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    text = (_FOLDER / "tickets_v2_as_defined.sql").read_text(encoding="utf-8")
    (before,) = re.findall(r"CREATE (FUNCTION engine_calls_alike_v1\(.*?\n\$\$;)", text, re.DOTALL)
    send_as_written(f"CREATE OR REPLACE {before}")
