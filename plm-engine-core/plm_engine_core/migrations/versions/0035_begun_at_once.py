"""An admission may use its grant up at once, for who makes the call right after it; it and the rate cost less.

Functions of the versions before stay for nodes that are not upgraded yet: a grant that began with its admission is as
any that has begun.

Revision ID: 0035
Revises: 0034
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0035"
down_revision = "0034"
branch_labels = None
depends_on = None

FILES = ("append_events_v1", "admit_v5", "as_assumed_v2")

SIGNATURES = (
    "engine_as_assumed_v2(jsonb, uuid, uuid, jsonb)",
    "engine_admit_v5(jsonb)",
    "engine_grant_v5(jsonb, jsonb, jsonb, boolean)",
    "engine_recalled_v5(jsonb, text, jsonb)",
    "engine_append_events_v1(uuid, text, text, text[], jsonb[])",
)

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    for name in FILES:
        send_as_written((_FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
