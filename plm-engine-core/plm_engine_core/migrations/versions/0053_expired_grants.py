"""What a grant holds that ran out before its call began comes back while its run goes on.

Two functions are replaced, for nodes of every release that calls them: a grant that was closed because it ran out has
expired for who would begin it, and whoever settles its call as not started is told so again. What else they answer is
as before.

Revision ID: 0053
Revises: 0052
"""

from __future__ import annotations

import re
from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0053"
down_revision = "0052"
branch_labels = None
depends_on = None

REPLACED = {
    "settled_before_v4_ran_out": ("settle_v4", "engine_settled_before_v4"),
    "unusable_v2_ran_out": ("begin_v2", "engine_unusable_v2"),
}
"""Of each file: where the function was written before, and its name."""

DEFINER = "engine_expired_grants_v1(integer)"
INVOKERS = ("engine_expire_v1(jsonb, jsonb)", "engine_ran_out_v1(grants)")

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    for name in ("expired_grants_v1", *REPLACED):
        send_as_written((_FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in (DEFINER, *INVOKERS):
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")
    op.execute("GRANT CREATE ON SCHEMA public TO plm_migrator")
    op.execute(f"ALTER FUNCTION {DEFINER} OWNER TO plm_migrator")
    op.execute("REVOKE CREATE ON SCHEMA public FROM plm_migrator")


def downgrade() -> None:
    for file, name in REPLACED.values():
        text = (_FOLDER / f"{file}.sql").read_text(encoding="utf-8")
        (before,) = re.findall(rf"CREATE (FUNCTION {name}\(.*?\n\$\$;)", text, re.DOTALL)
        send_as_written(f"CREATE OR REPLACE {before}")
    for signature in (DEFINER, *INVOKERS):
        op.execute(f"DROP FUNCTION {signature}")
