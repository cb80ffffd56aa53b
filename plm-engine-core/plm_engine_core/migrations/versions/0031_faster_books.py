"""The books at less cost: fewer statements, and no look for a parent that the function has just written or locked.

Version 3 of admitting, beginning and settling, and version 2 of appending an event; those before stay for nodes that
are not upgraded yet. An admission now also refuses what was decided by a policy that is not the active one any more.

Revision ID: 0031
Revises: 0030
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None

FILES = ("enter_v2", "append_event_v2", "budgets_v3", "admit_v3", "begin_v3", "settle_v3")

SIGNATURES = (
    "engine_settle_v3(jsonb, json)",
    "engine_write_ledger_v1(uuid, json)",
    "engine_hold_grant_v3(uuid, uuid, integer, integer, uuid, bigint, text)",
    "engine_begin_v3(uuid, uuid, integer, integer, uuid, bigint, text)",
    "engine_admit_v3(jsonb)",
    "engine_recalled_v3(jsonb, text, jsonb)",
    "engine_write_attempt_v3(jsonb, text, jsonb, jsonb)",
    "engine_park_v3(jsonb, jsonb, jsonb)",
    "engine_lock_above_v3(uuid, uuid, uuid, text, text)",
    "engine_charge_v3(uuid, uuid, jsonb)",
    "engine_reserve_v3(uuid, jsonb)",
    "engine_append_event_v2(uuid, text, text, text, jsonb)",
    "engine_enter_v2(uuid)",
)

# Each of these keys was looked up for every row of an admission. What it proved stays proved: an event is inserted by
# the function that has just locked or made its stream's head, a reservation by the one that has just made its grant, an
# idempotency record beside the run or budget that it is about. A stream keeps its tenant from being removed, as its
# events did.
KEYS = """
ALTER TABLE events DROP CONSTRAINT events_tenant_id_stream_fkey;
ALTER TABLE event_streams DROP CONSTRAINT event_streams_tenant_id_fkey,
    ADD CONSTRAINT event_streams_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id);
ALTER TABLE reservations DROP CONSTRAINT reservations_tenant_id_grant_id_fkey;
ALTER TABLE idempotency_records DROP CONSTRAINT idempotency_records_tenant_id_fkey;
"""
BACK = """
ALTER TABLE idempotency_records ADD CONSTRAINT idempotency_records_tenant_id_fkey
    FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE;
ALTER TABLE reservations ADD CONSTRAINT reservations_tenant_id_grant_id_fkey
    FOREIGN KEY (tenant_id, grant_id) REFERENCES grants (tenant_id, id) ON DELETE CASCADE;
ALTER TABLE event_streams DROP CONSTRAINT event_streams_tenant_id_fkey,
    ADD CONSTRAINT event_streams_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE;
ALTER TABLE events ADD CONSTRAINT events_tenant_id_stream_fkey
    FOREIGN KEY (tenant_id, stream) REFERENCES event_streams (tenant_id, stream);
"""

# Of two indexes that promise one row each the planner takes the newer. In a plan made while the table was small and
# nothing known of it, the one by creation promises that too, and every run of the tenant would be read to find one.
INDEXES = """
DROP INDEX ix_run_states_run;
CREATE INDEX ix_run_states_run ON run_states (run_id);
"""


def upgrade() -> None:
    op.execute(KEYS)
    op.execute(INDEXES)
    package = files("plm_engine_core")
    folder = package / "control_plane" / "storage" / "sql"
    written = [folder / f"{name}.sql" for name in FILES]
    # Beside this file, as nothing but the ledger's emitter and migrations writes into its tables.
    written.append(package / "migrations" / "versions" / "0031_ledger_v1.sql")
    for each in written:
        send_as_written(each.read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
    op.execute(BACK)
