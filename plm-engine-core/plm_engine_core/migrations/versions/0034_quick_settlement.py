"""A settlement at less cost: a single new row of the ledger is inserted plainly, and budgets are charged in place.

Functions of the versions before stay for nodes that are not upgraded yet, and the ledger's for what is not plain.

Revision ID: 0034
Revises: 0033
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None

SIGNATURES = ("engine_settle_v5(jsonb, jsonb)", "engine_write_ledger_v3(uuid, jsonb)")


def upgrade() -> None:
    package = files("plm_engine_core")
    # The ledger's stands beside this file, as nothing but its emitter and migrations writes into its tables.
    ledger = package / "migrations" / "versions" / "0034_ledger_v3.sql"
    settle = package / "control_plane" / "storage" / "sql" / "settle_v5.sql"
    for written in (ledger, settle):
        send_as_written(written.read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
