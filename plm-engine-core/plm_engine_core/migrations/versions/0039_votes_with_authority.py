"""A vote counts with the authority that its ticket needs when it is decided.

Version 2 of the functions stays for nodes that are not upgraded yet.

Revision ID: 0039
Revises: 0038
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0039"
down_revision = "0038"
branch_labels = None
depends_on = None

SIGNATURES = ("engine_refused_vote_v3(approval_tickets, jsonb, jsonb)", "engine_decide_ticket_v3(jsonb)")

GIVEN_AGAIN = "UPDATE (comment, authority, scope_uses, scope_seconds, scope_any_resource, voted_at) ON approval_votes"
"""Of a vote; who gave it, on what, and which way, nobody changes."""

_FILE = files("plm_engine_core") / "control_plane" / "storage" / "sql" / "decide_ticket_v3.sql"


def upgrade() -> None:
    op.execute(f"GRANT {GIVEN_AGAIN} TO plm_engine_writer")
    send_as_written(_FILE.read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for signature in reversed(SIGNATURES):
        op.execute(f"DROP FUNCTION {signature}")
    op.execute(f"REVOKE {GIVEN_AGAIN} FROM plm_engine_writer")
