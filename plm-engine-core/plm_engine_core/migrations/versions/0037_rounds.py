"""Bookings made beside each other are one message, and each says how long it waits for a lock.

The functions that book are those of the versions before without a bound of their own on waiting for locks, which would
go before the caller's. Those stay for nodes that are not upgraded yet.

Revision ID: 0037
Revises: 0036
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None

FILES = ("admit_v7", "settle_v7", "begin_v5", "prepare_v3", "as_assumed_v3", "book_v1")

SIGNATURES = (
    "engine_admit_v7(jsonb)",
    "engine_settle_v7(jsonb, jsonb)",
    "engine_begin_v5(uuid, uuid, integer, integer, uuid, bigint, text)",
    "engine_prepare_v3(uuid, uuid, jsonb)",
    "engine_as_assumed_v3(jsonb, uuid, uuid, jsonb)",
    "engine_book_v1(jsonb)",
    "engine_book_patiently_v1(jsonb)",
    "engine_book_round_v1(text, text, text)",
)

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    for name in FILES:
        send_as_written((_FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON ROUTINE {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON ROUTINE {signature} TO plm_engine_writer")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP ROUTINE {signature}")
