"""The ask that stands in place of a run's failure is an event of its own.

One function is replaced, for nodes of every release that calls it: only what this release says of an ask is told.

Revision ID: 0052
Revises: 0051
"""

from __future__ import annotations

import re
from importlib.resources import files

from plm_shared.migrations.chain import send_as_written

revision = "0052"
down_revision = "0051"
branch_labels = None
depends_on = None

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    send_as_written((_FOLDER / "ask_v1_escalation.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    text = (_FOLDER / "ask_v1.sql").read_text(encoding="utf-8")
    (before,) = re.findall(r"CREATE (FUNCTION engine_ask_v1\(.*?\n\$\$;)", text, re.DOTALL)
    send_as_written(f"CREATE OR REPLACE {before}")
