"""An admission takes the tokens of the rate itself, where it was decided without having asked whether there are any.

Revision ID: 0032
Revises: 0031
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None

FILE = "as_assumed_v1"
SIGNATURE = "engine_as_assumed_v1(jsonb, uuid, uuid, jsonb)"


def upgrade() -> None:
    written = files("plm_engine_core") / "control_plane" / "storage" / "sql" / f"{FILE}.sql"
    send_as_written(written.read_text(encoding="utf-8"))
    op.execute(f"REVOKE ALL ON FUNCTION {SIGNATURE} FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION {SIGNATURE} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {SIGNATURE}")
