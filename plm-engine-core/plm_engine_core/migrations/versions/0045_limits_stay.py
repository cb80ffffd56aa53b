"""No other limit comes between that of a policy and the reservation under it; a full budget is still not locked.

The function is replaced, for nodes of every release that calls it: its contract is as before.

Revision ID: 0045
Revises: 0044
"""

from __future__ import annotations

from importlib.resources import files

from plm_shared.migrations.chain import send_as_written

revision = "0045"
down_revision = "0044"
branch_labels = None
depends_on = None

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    send_as_written((_FOLDER / "open_budget_v2_full.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    send_as_written((_FOLDER / "open_budget_v2_as_it_stands.sql").read_text(encoding="utf-8"))
