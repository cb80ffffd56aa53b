"""An agent may ask a human for an input; the ask is a ticket of the gate that approvals pass.

No column is added: a step and a ticket that ask have the word `provide_input` where others have a capability, and no
capability can have that id. The functions that end tickets are replaced, so that nodes of the release before end an
ask's step with its ticket, and can deny one, but never answer it with an approval. Of approvals all is as it was, but
that who decides a ticket may say as which revision it was read.

Revision ID: 0047
Revises: 0046
"""

from __future__ import annotations

import re
from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0047"
down_revision = "0046"
branch_labels = None
depends_on = None

SIGNATURES = (
    "engine_provide_input_v1(jsonb)",
    "engine_end_ask_v1(approval_tickets, jsonb, text, text)",
    "engine_asked_v1(jsonb, run_steps)",
    "engine_ask_v1(jsonb)",
    "engine_ticket_revision_v1(approval_tickets)",
)

REPLACED = {
    "engine_time_out_ticket_v2": "approvals_v2",
    "engine_refused_vote_v2": "approvals_v2",
    "engine_refused_vote_v3": "decide_ticket_v3",
    "engine_decide_ticket_v3": "decide_ticket_v3",
}
"""Of each function that is replaced: where it was written before."""

NOT_BY_REQUESTER = """
ALTER TABLE approval_tickets DROP CONSTRAINT approval_tickets_check;
ALTER TABLE approval_tickets ADD CONSTRAINT approval_tickets_check
    CHECK (decided_by IS NULL OR decided_by <> requested_by{but}
"""
"""Nobody decides what they asked for; an input allows nothing, and the policy says whether they give it themselves."""

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    op.execute(NOT_BY_REQUESTER.format(but=" OR capability = 'provide_input');"))
    for name in ("ask_v1", "tickets_v3_with_asks"):
        send_as_written((_FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for name, file in REPLACED.items():
        text = (_FOLDER / f"{file}.sql").read_text(encoding="utf-8")
        (before,) = re.findall(rf"CREATE (FUNCTION {name}\(.*?\n\$\$;)", text, re.DOTALL)
        send_as_written(f"CREATE OR REPLACE {before}")
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
    op.execute(NOT_BY_REQUESTER.format(but=") NOT VALID;"))  # asks that were answered so stay
