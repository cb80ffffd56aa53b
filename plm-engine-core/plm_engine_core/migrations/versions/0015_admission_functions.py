"""The functions that keep the books: admit, begin, settle, decide a ticket, take a rate token.

Each lives in a named file beside the port that calls it and is frozen: a change of behaviour is a new version in a new
file and a new migration.

Revision ID: 0015
Revises: 0014
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

FILES = ("common_v1", "admit_v1", "begin_v1", "settle_v1", "decide_ticket_v1", "take_rate_v1")

SIGNATURES = (
    "engine_take_rate_v1(uuid, text, double precision, double precision)",
    "engine_decide_ticket_v1(uuid, uuid, text, uuid, text, text)",
    "engine_settle_v1(jsonb)",
    "engine_spent_v1(uuid, uuid)",
    "engine_hold_grant_v1(uuid, uuid, uuid, bigint, text)",
    "engine_begin_v1(uuid, uuid, uuid, bigint, text)",
    "engine_admit_v1(jsonb)",
    "engine_hold_run_v1(uuid, uuid, bigint, boolean)",
    "engine_standing_halt_v1(uuid, uuid)",
    "engine_lock_halts_v1(uuid, uuid)",
    "engine_append_event_v1(uuid, text, text, text, jsonb)",
    "engine_event_hash_v1(uuid, text, bigint, bytea, text, text, timestamptz, text)",
    "engine_enter_v1(uuid)",
)


def upgrade() -> None:
    folder = files("plm_engine_core") / "control_plane" / "storage" / "sql"
    for name in FILES:
        send_as_written((folder / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
