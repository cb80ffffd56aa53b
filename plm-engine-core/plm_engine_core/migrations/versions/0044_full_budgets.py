"""A call that a full budget refuses does not lock it: however many are refused at once, none waits for another.

The function is replaced, for nodes of every release that calls it: its contract is as before.

Revision ID: 0044
Revises: 0043
"""

from __future__ import annotations

from importlib.resources import files

from plm_shared.migrations.chain import send_as_written

revision = "0044"
down_revision = "0043"
branch_labels = None
depends_on = None

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    send_as_written((_FOLDER / "open_budget_v2_as_it_stands.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    send_as_written((_FOLDER / "open_budget_v2_in_force.sql").read_text(encoding="utf-8"))
