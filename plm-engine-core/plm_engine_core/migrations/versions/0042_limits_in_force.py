"""A limit of the policy in force binds what an earlier policy opened; a clock that was set back holds nobody up.

Three functions are replaced, for nodes of every release that calls them: their contract is as before.

Revision ID: 0042
Revises: 0041
"""

from __future__ import annotations

import re
from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0042"
down_revision = "0041"
branch_labels = None
depends_on = None

REPLACED = {
    "take_token_v2_set_back": ("prepare_v2", "engine_take_token_v2"),
    "open_budget_v2_in_force": ("budgets_v2", "engine_open_budget_v2"),
    "reserve_v4_in_force": ("budgets_v4", "engine_reserve_v4"),
}
"""Of each file: where the function was written before, and its name."""

DEFINER = "engine_runs_ahead_v1(integer, double precision)"
LOOK = "engine_is_ahead_v1(run_states, double precision)"

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    for name in (*REPLACED, "runs_ahead_v1"):
        send_as_written((_FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in (DEFINER, LOOK):
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")
    op.execute(f"GRANT EXECUTE ON FUNCTION {LOOK} TO plm_migrator")
    op.execute("GRANT CREATE ON SCHEMA public TO plm_migrator")
    op.execute(f"ALTER FUNCTION {DEFINER} OWNER TO plm_migrator")
    op.execute("REVOKE CREATE ON SCHEMA public FROM plm_migrator")


def downgrade() -> None:
    for signature in (DEFINER, LOOK):
        op.execute(f"DROP FUNCTION {signature}")
    for file, name in REPLACED.values():
        text = (_FOLDER / f"{file}.sql").read_text(encoding="utf-8")
        (before,) = re.findall(rf"CREATE (FUNCTION {name}\(.*?\n\$\$;)", text, re.DOTALL)
        send_as_written(f"CREATE OR REPLACE {before}")
