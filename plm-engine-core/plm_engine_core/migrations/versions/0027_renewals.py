"""A lease is renewed by one statement: a holder paused between two kept the run's row from whoever takes it over.

Revision ID: 0027
Revises: 0026
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

RENEW = "engine_renew_lease_v1(uuid, uuid, bigint, double precision)"


def upgrade() -> None:
    sql = files("plm_engine_core") / "control_plane" / "storage" / "sql" / "renew_lease_v1.sql"
    send_as_written(sql.read_text(encoding="utf-8"))
    op.execute(f"REVOKE ALL ON FUNCTION {RENEW} FROM PUBLIC")
    op.execute(f"GRANT EXECUTE ON FUNCTION {RENEW} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {RENEW}")
