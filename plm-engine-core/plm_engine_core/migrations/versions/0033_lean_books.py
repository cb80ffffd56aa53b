"""The books at less cost again: no rows for reservations, and no checks of what only the functions write.

Version 4 of admitting, beginning and settling keeps what a grant has set aside with the grant. Functions of the
versions before stay for nodes that are not upgraded yet: each side closes the grants of the other.

Revision ID: 0033
Revises: 0032
"""

from __future__ import annotations

import re
from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None

FILES = ("append_event_v3", "budgets_v4", "admit_v4", "begin_v4", "settle_v4", "hold_grant_v3_spread")
HOLDERS = {"settle_v1": "engine_hold_grant_v1", "settle_v3": "engine_hold_grant_v3"}

SIGNATURES = (
    "engine_spread_reservations_v1(uuid, uuid)",
    "engine_settled_before_v4(jsonb)",
    "engine_settle_v4(jsonb, json)",
    "engine_write_ledger_v2(uuid, json)",
    "engine_begin_v4(uuid, uuid, integer, integer, uuid, bigint, text)",
    "engine_admit_v4(jsonb)",
    "engine_write_attempt_v4(jsonb, text, jsonb, jsonb)",
    "engine_spent_v4(jsonb, jsonb)",
    "engine_charge_v4(uuid, jsonb, jsonb)",
    "engine_reserve_v4(uuid, jsonb)",
    "engine_append_event_v3(uuid, text, text, text, jsonb)",
)

# `reserved` is what the admission set aside, entry by entry, with the window each fell in; null where rows of
# `reservations` say so. `charged` is the amount per unit that the settlement named.
COLUMNS = """
ALTER TABLE grants ADD COLUMN reserved jsonb, ADD COLUMN charged jsonb;
GRANT UPDATE (reserved, charged) ON grants TO plm_engine_writer;
"""

# PostgreSQL reads and plans every check of a table anew in each statement that writes to it, which cost more than the
# write. What these asked of, the functions write as constants; amounts, which are computed, are still checked, by one.
CHECKS = {
    "budgets": {
        "budgets_limit_amount_check": "limit_amount >= 0",
        "budgets_spent_check": "spent >= 0",
        "budgets_reserved_check": "reserved >= 0",
        "budgets_unit_check": "unit <> ''",
        "budgets_period_check": "period IN ('total', 'day', 'week', 'month')",
        "budgets_scope_kind_check": "scope_kind IN ('run', 'run_group', 'agent', 'user', 'team', 'model', 'tenant')",
    },
    "grants": {"grants_state_check": "state IN ('issued', 'begun', 'settled', 'revoked')"},
    "run_steps": {
        "run_steps_step_index_check": "step_index >= 0",
        "run_steps_attempt_check": "attempt >= 1",
        "run_steps_executor_kind_check": "executor_kind IN ('plugin', 'external')",
        "run_steps_evidence_check": "evidence IN ('reported', 'measured', 'verified')",
        "run_steps_state_check": "state IN ('denied', 'steered', 'awaiting_approval', 'granted', 'running',"
        " 'succeeded', 'failed', 'cancelled', 'not_started', 'superseded', 'outcome_unknown')",
    },
    "events": {"events_seq_check": "seq >= 1", "events_kind_check": "kind <> ''"},
}
AMOUNTS = "ALTER TABLE budgets ADD CONSTRAINT budgets_amounts_check CHECK (LEAST(limit_amount, spent, reserved) >= 0)"

# The attempt is written by the function that then issues its grant.
KEY = "ALTER TABLE grants DROP CONSTRAINT grants_tenant_id_run_id_step_index_attempt_fkey"
BACK = """
ALTER TABLE grants ADD FOREIGN KEY (tenant_id, run_id, step_index, attempt)
    REFERENCES run_steps (tenant_id, run_id, step_index, attempt) ON DELETE CASCADE;
ALTER TABLE budgets DROP CONSTRAINT budgets_amounts_check;
"""

# Every booking begins with its run: whoever has this waits for none that is half-way, and none for a part of the rest.
BOOKINGS = "LOCK TABLE run_states IN ACCESS EXCLUSIVE MODE"

_FOLDER = files("plm_engine_core") / "control_plane" / "storage" / "sql"


def upgrade() -> None:
    op.execute(BOOKINGS)
    op.execute(COLUMNS)
    op.execute(AMOUNTS)
    for table, checks in CHECKS.items():
        op.execute(f"ALTER TABLE {table} " + ", ".join(f"DROP CONSTRAINT {name}" for name in checks))
    op.execute(KEY)
    # The ledger's stands beside this file, as nothing but its emitter and migrations writes into its tables.
    ledger = files("plm_engine_core") / "migrations" / "versions" / "0033_ledger_v2.sql"
    for written in (ledger, *(_FOLDER / f"{name}.sql" for name in FILES)):
        send_as_written(written.read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(BOOKINGS)
    for table in ("grants", "reservations"):
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")  # the owner moves rows of every tenant
    op.execute("SELECT engine_spread_reservations_v1(tenant_id, id) FROM grants WHERE reserved IS NOT NULL")
    for table in ("grants", "reservations"):
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    for file, name in HOLDERS.items():
        text = (_FOLDER / f"{file}.sql").read_text(encoding="utf-8")
        (before,) = re.findall(rf"CREATE (FUNCTION {name}\(.*?\n\$\$;)", text, re.DOTALL)
        send_as_written(f"CREATE OR REPLACE {before}")
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
    op.execute(BACK)
    for table, checks in CHECKS.items():
        added = (f"ADD CONSTRAINT {name} CHECK ({check})" for name, check in checks.items())
        op.execute(f"ALTER TABLE {table} " + ", ".join(added))
    op.execute("ALTER TABLE grants DROP COLUMN reserved, DROP COLUMN charged")
