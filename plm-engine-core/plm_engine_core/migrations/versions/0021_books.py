"""Books by scope and window: for whom a run works, budgets of more scopes and periods, halts of more scopes.

The functions of version 2 keep these books, one function for each; those of version 1 stay for nodes that are not
upgraded yet. A node of version 1 knows only the budgets of a run and its tenant, and halts of run, tenant and system.

Revision ID: 0021
Revises: 0020
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

# The tickets that an admission asks for come with the next revision.
FILES = ("halts_v2", "budgets_v2", "admit_v2", "begin_v2", "settle_v2", "prepare_v2")

SIGNATURES = (
    "engine_prepare_v2(uuid, uuid, jsonb)",
    "engine_take_token_v2(uuid, text, double precision, double precision)",
    "engine_settle_v2(jsonb)",
    "engine_write_outcome_v2(jsonb, grants)",
    "engine_spent_v2(uuid, uuid)",
    "engine_begin_v2(uuid, uuid, uuid, bigint, text)",
    "engine_unusable_v2(uuid, uuid, uuid, bigint)",
    "engine_admit_v2(jsonb)",
    "engine_recall_v2(uuid, text, text, text)",
    "engine_write_step_v2(jsonb, text, jsonb)",
    "engine_issue_grant_v2(jsonb, jsonb)",
    "engine_charge_v2(uuid, uuid, jsonb)",
    "engine_unaffordable_v2(uuid, jsonb, timestamptz)",
    "engine_release_v2(uuid, jsonb)",
    "engine_reserve_v2(uuid, jsonb)",
    "engine_open_budget_v2(uuid, jsonb, timestamptz)",
    "engine_window_v2(text)",
    "engine_halted_v2(jsonb)",
    "engine_standing_halt_v2(uuid, uuid, uuid, text, text)",
    "engine_lock_halts_v2(uuid, uuid, uuid, text, text)",
)

RUNS = """
ALTER TABLE run_states ADD COLUMN agent_id text, ADD COLUMN run_group_id uuid, ADD COLUMN user_id uuid,
    ADD COLUMN team text;
CREATE INDEX ix_run_states_group ON run_states (tenant_id, run_group_id) WHERE run_group_id IS NOT NULL;
CREATE INDEX ix_run_states_agent ON run_states (tenant_id, agent_id, state) WHERE agent_id IS NOT NULL;
"""

# `subject` names what has no id of its own (an agent, a team, a model); its scope_id is derived from the name. A row
# with a period is one window of a budget; `pinned`: an operator set its limit, which then holds for later windows.
BUDGETS = """
ALTER TABLE budgets DROP CONSTRAINT budgets_scope_kind_check,
    ADD CONSTRAINT budgets_scope_kind_check CHECK (scope_kind IN
        ('run', 'run_group', 'agent', 'user', 'team', 'model', 'tenant')),
    ADD COLUMN period text NOT NULL DEFAULT 'total' CHECK (period IN ('total', 'day', 'week', 'month')),
    ADD COLUMN starts_at timestamptz NOT NULL DEFAULT to_timestamp(0),
    ADD COLUMN subject text,
    ADD COLUMN pinned boolean NOT NULL DEFAULT false,
    DROP CONSTRAINT budgets_pkey,
    ADD CONSTRAINT budgets_pkey PRIMARY KEY (tenant_id, scope_kind, scope_id, unit, period, starts_at);
ALTER TABLE reservations
    ADD COLUMN position bigint NOT NULL DEFAULT 0,
    ADD COLUMN period text NOT NULL DEFAULT 'total',
    ADD COLUMN starts_at timestamptz NOT NULL DEFAULT to_timestamp(0),
    DROP CONSTRAINT reservations_pkey,
    ADD CONSTRAINT reservations_pkey PRIMARY KEY (tenant_id, grant_id, scope_kind, scope_id, unit, period);
GRANT UPDATE (pinned) ON budgets TO plm_engine_writer;
"""

HALTS = """
ALTER TABLE halts DROP CONSTRAINT halts_scope_check,
    ADD CONSTRAINT halts_scope_check CHECK (scope IN ('tenant', 'agent', 'run_group', 'run', 'capability')),
    ADD COLUMN subject text,
    ALTER COLUMN scope_id DROP NOT NULL,
    ADD CONSTRAINT halts_names_its_scope CHECK (
        CASE WHEN scope IN ('agent', 'capability') THEN subject <> '' AND scope_id IS NULL
             ELSE scope_id IS NOT NULL AND subject IS NULL END);
DROP INDEX uq_halts_standing;
CREATE UNIQUE INDEX uq_halts_standing ON halts (tenant_id, scope, scope_id, subject) NULLS NOT DISTINCT
    WHERE lifted_at IS NULL;
"""

DATA = ("halts", "reservations", "budgets")
BACK = """
DROP INDEX uq_halts_standing;
DELETE FROM halts WHERE scope NOT IN ('tenant', 'run');
ALTER TABLE halts DROP CONSTRAINT halts_names_its_scope, DROP CONSTRAINT halts_scope_check, DROP COLUMN subject,
    ALTER COLUMN scope_id SET NOT NULL,
    ADD CONSTRAINT halts_scope_check CHECK (scope IN ('tenant', 'run'));
CREATE UNIQUE INDEX uq_halts_standing ON halts (tenant_id, scope, scope_id) WHERE lifted_at IS NULL;
DELETE FROM reservations WHERE scope_kind NOT IN ('run', 'tenant') OR period <> 'total';
ALTER TABLE reservations DROP CONSTRAINT reservations_pkey,
    DROP COLUMN position, DROP COLUMN period, DROP COLUMN starts_at,
    ADD CONSTRAINT reservations_pkey PRIMARY KEY (tenant_id, grant_id, scope_kind, scope_id, unit);
DELETE FROM budgets WHERE scope_kind NOT IN ('run', 'tenant') OR period <> 'total';
ALTER TABLE budgets DROP CONSTRAINT budgets_pkey, DROP CONSTRAINT budgets_scope_kind_check,
    DROP COLUMN period, DROP COLUMN starts_at, DROP COLUMN subject, DROP COLUMN pinned,
    ADD CONSTRAINT budgets_pkey PRIMARY KEY (tenant_id, scope_kind, scope_id, unit),
    ADD CONSTRAINT budgets_scope_kind_check CHECK (scope_kind IN ('run', 'tenant'));
ALTER TABLE run_states DROP COLUMN agent_id, DROP COLUMN run_group_id, DROP COLUMN user_id, DROP COLUMN team;
"""


def upgrade() -> None:
    for ddl in (RUNS, BUDGETS, HALTS):
        op.execute(ddl)
    folder = files("plm_engine_core") / "control_plane" / "storage" / "sql"
    for name in FILES:
        send_as_written((folder / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
    for table in DATA:
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")  # the owner removes rows of every tenant
    op.execute(BACK)
    for table in DATA:
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
