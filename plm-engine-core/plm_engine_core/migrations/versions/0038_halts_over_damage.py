"""An approval scope that cannot be ended keeps no halt from ending what else it is over.

Version 2 of the function stays for nodes that are not upgraded yet.

Revision ID: 0038
Revises: 0037
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0038"
down_revision = "0037"
branch_labels = None
depends_on = None

SIGNATURE = "engine_end_halted_v3(uuid)"

_FILE = files("plm_engine_core") / "control_plane" / "storage" / "sql" / "end_halted_v3.sql"


def upgrade() -> None:
    send_as_written(_FILE.read_text(encoding="utf-8"))
    op.execute(f"REVOKE ALL ON FUNCTION {SIGNATURE} FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION {SIGNATURE} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {SIGNATURE}")
