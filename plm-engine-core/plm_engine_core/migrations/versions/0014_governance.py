"""Governance tables: runs and steps, grants, budgets, tickets, halts, event streams.

Revision ID: 0014
Revises: 0013
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

RUN_STATES = """
CREATE TABLE run_states (
    tenant_id           uuid        NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    run_id              uuid        NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    kind                text        NOT NULL CHECK (kind IN ('hosted', 'external')),
    state               text        NOT NULL CHECK (state IN ('queued', 'running', 'awaiting_approval', 'halted',
                                        'outcome_unknown', 'succeeded', 'failed', 'cancelled')),
    agent               jsonb       NOT NULL,
    input               jsonb       NOT NULL,
    principal           jsonb       NOT NULL,
    policy_digest       text        NOT NULL,
    trace_id            text        NOT NULL,
    root_span_id        text        NOT NULL,
    lease_owner         text,
    lease_expires_at    timestamptz,
    fencing_token       bigint      NOT NULL DEFAULT 0,
    cancel_requested_at timestamptz,
    reason              text,
    message             text,
    result              jsonb,
    created_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at         timestamptz,
    PRIMARY KEY (tenant_id, run_id)
);
CREATE INDEX ix_run_states_run ON run_states (run_id);
CREATE INDEX ix_run_states_created ON run_states (tenant_id, created_at DESC, run_id DESC);
CREATE INDEX ix_run_states_live ON run_states (updated_at)
    WHERE state IN ('queued', 'running', 'awaiting_approval', 'halted');
"""

RUN_STEPS = """
CREATE TABLE run_steps (
    tenant_id        uuid        NOT NULL,
    run_id           uuid        NOT NULL,
    step_index       integer     NOT NULL CHECK (step_index >= 0),
    attempt          integer     NOT NULL CHECK (attempt >= 1),
    step_id          text        NOT NULL,
    step_key         text        NOT NULL,
    capability       text        NOT NULL,
    resource         text        NOT NULL,
    arguments        jsonb       NOT NULL,
    arguments_digest text        NOT NULL,
    executor_kind    text        NOT NULL CHECK (executor_kind IN ('plugin', 'external')),
    state            text        NOT NULL CHECK (state IN ('denied', 'steered', 'awaiting_approval', 'granted',
                                     'running', 'succeeded', 'failed', 'cancelled', 'not_started', 'superseded',
                                     'outcome_unknown')),
    decision         jsonb       NOT NULL,
    grant_id         uuid,
    ticket_id        uuid,
    evidence         text        CHECK (evidence IN ('reported', 'measured', 'verified')),
    output           jsonb,
    error            jsonb,
    usage            jsonb,
    created_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at       timestamptz,
    finished_at      timestamptz,
    PRIMARY KEY (tenant_id, run_id, step_index, attempt),
    FOREIGN KEY (tenant_id, run_id) REFERENCES run_states (tenant_id, run_id) ON DELETE CASCADE
);
"""

APPROVAL_TICKETS = """
CREATE TABLE approval_tickets (
    tenant_id     uuid        NOT NULL,
    id            uuid        NOT NULL,
    run_id        uuid        NOT NULL,
    step_index    integer     NOT NULL,
    attempt       integer     NOT NULL,
    capability    text        NOT NULL,
    resource      text        NOT NULL,
    arguments     jsonb       NOT NULL,
    digest        text        NOT NULL,
    policy_digest text        NOT NULL,
    tier          text        NOT NULL,
    risk          text        NOT NULL,
    requested_by  uuid        NOT NULL,
    state         text        NOT NULL DEFAULT 'pending'
                  CHECK (state IN ('pending', 'approved', 'denied', 'expired', 'cancelled')),
    deadline      timestamptz NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    decided_at    timestamptz,
    decided_by    uuid,
    comment       text,
    consumed_at   timestamptz,
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, run_id, step_index, attempt),
    FOREIGN KEY (tenant_id, run_id, step_index, attempt)
        REFERENCES run_steps (tenant_id, run_id, step_index, attempt) ON DELETE CASCADE,
    CHECK (decided_by IS NULL OR decided_by <> requested_by)
);
CREATE INDEX ix_approval_tickets_state ON approval_tickets (tenant_id, state, created_at, id);
CREATE INDEX ix_approval_tickets_deadline ON approval_tickets (deadline) WHERE state = 'pending';
"""

GRANTS = """
CREATE TABLE grants (
    tenant_id     uuid        NOT NULL,
    id            uuid        NOT NULL,
    run_id        uuid        NOT NULL,
    step_index    integer     NOT NULL,
    attempt       integer     NOT NULL,
    digest        text        NOT NULL,
    policy_digest text        NOT NULL,
    span_id       text        NOT NULL,
    fencing_token bigint      NOT NULL,
    secret_hash   bytea,
    state         text        NOT NULL DEFAULT 'issued' CHECK (state IN ('issued', 'begun', 'settled')),
    issued_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at    timestamptz NOT NULL,
    begun_at      timestamptz,
    settled_at    timestamptz,
    outcome       text,
    outcome_digest text,
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, run_id, step_index, attempt),
    FOREIGN KEY (tenant_id, run_id, step_index, attempt)
        REFERENCES run_steps (tenant_id, run_id, step_index, attempt) ON DELETE CASCADE
);
"""

BUDGETS = """
CREATE TABLE budgets (
    tenant_id    uuid           NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    scope_kind   text           NOT NULL CHECK (scope_kind IN ('run', 'tenant')),
    scope_id     uuid           NOT NULL,
    unit         text           NOT NULL CHECK (unit <> ''),
    limit_amount numeric(20, 8) NOT NULL CHECK (limit_amount >= 0),
    spent        numeric(20, 8) NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved     numeric(20, 8) NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    PRIMARY KEY (tenant_id, scope_kind, scope_id, unit)
) WITH (fillfactor = 50);
CREATE TABLE reservations (
    tenant_id  uuid           NOT NULL,
    grant_id   uuid           NOT NULL,
    scope_kind text           NOT NULL,
    scope_id   uuid           NOT NULL,
    unit       text           NOT NULL,
    amount     numeric(20, 8) NOT NULL CHECK (amount >= 0),
    settled    numeric(20, 8) CHECK (settled >= 0),
    PRIMARY KEY (tenant_id, grant_id, scope_kind, scope_id, unit),
    FOREIGN KEY (tenant_id, grant_id) REFERENCES grants (tenant_id, id) ON DELETE CASCADE
);
"""

HALTS = """
CREATE TABLE halts (
    tenant_id    uuid        NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    id           uuid        NOT NULL,
    scope        text        NOT NULL CHECK (scope IN ('tenant', 'run')),
    scope_id     uuid        NOT NULL,
    epoch        bigint      NOT NULL,
    reason       text        NOT NULL CHECK (reason <> ''),
    triggered_by uuid        NOT NULL,
    triggered_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lifted_by    uuid,
    lifted_at    timestamptz,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX uq_halts_standing ON halts (tenant_id, scope, scope_id) WHERE lifted_at IS NULL;
CREATE TABLE halts_system (
    id           uuid        NOT NULL PRIMARY KEY,
    epoch        bigint      NOT NULL GENERATED ALWAYS AS IDENTITY,
    reason       text        NOT NULL CHECK (reason <> ''),
    triggered_by uuid        NOT NULL,
    triggered_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lifted_by    uuid,
    lifted_at    timestamptz
);
CREATE UNIQUE INDEX uq_halts_system_standing ON halts_system ((true)) WHERE lifted_at IS NULL;
"""

IDEMPOTENCY = """
CREATE TABLE idempotency_records (
    tenant_id  uuid        NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    operation  text        NOT NULL,
    command_id text        NOT NULL,
    digest     text        NOT NULL,
    result     jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, operation, command_id)
);
CREATE TABLE rate_buckets (
    tenant_id  uuid             NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    dimension  text             NOT NULL,
    tokens     double precision NOT NULL,
    updated_at timestamptz      NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, dimension)
) WITH (fillfactor = 50);
"""

EVENTS = """
CREATE TABLE event_streams (
    tenant_id uuid   NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    stream    text   NOT NULL,
    last_seq  bigint NOT NULL DEFAULT 0,
    last_hash bytea  NOT NULL DEFAULT '\\x',
    PRIMARY KEY (tenant_id, stream)
) WITH (fillfactor = 50);
CREATE TABLE events (
    tenant_id   uuid        NOT NULL,
    stream      text        NOT NULL,
    seq         bigint      NOT NULL CHECK (seq >= 1),
    prev_hash   bytea       NOT NULL,
    hash        bytea       NOT NULL,
    kind        text        NOT NULL CHECK (kind <> ''),
    actor       text        NOT NULL,
    occurred_at timestamptz NOT NULL,
    payload     text        NOT NULL,
    PRIMARY KEY (tenant_id, stream, seq),
    FOREIGN KEY (tenant_id, stream) REFERENCES event_streams (tenant_id, stream)
);
CREATE FUNCTION engine_refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'check_violation', CONSTRAINT = TG_TABLE_NAME || '_append_only',
        MESSAGE = format('%s is append-only: %s is refused', TG_TABLE_NAME, TG_OP);
END
$$;
CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE ON events
    FOR EACH ROW EXECUTE FUNCTION engine_refuse_change();
CREATE TRIGGER events_no_truncate BEFORE TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION engine_refuse_change();
ALTER TABLE events ENABLE ALWAYS TRIGGER events_append_only;
ALTER TABLE events ENABLE ALWAYS TRIGGER events_no_truncate;
"""

TENANT_TABLES = (
    "run_states",
    "run_steps",
    "approval_tickets",
    "grants",
    "budgets",
    "reservations",
    "halts",
    "idempotency_records",
    "rate_buckets",
    "event_streams",
    "events",
)

GRANTS_TO_WRITER = """
GRANT SELECT, INSERT ON run_states, run_steps, approval_tickets, grants, budgets, reservations, halts, halts_system,
    idempotency_records, rate_buckets, event_streams, events TO plm_engine_writer;
GRANT UPDATE (state, lease_owner, lease_expires_at, fencing_token, cancel_requested_at, reason, message, result,
    updated_at, finished_at) ON run_states TO plm_engine_writer;
GRANT UPDATE (state, decision, capability, resource, arguments, arguments_digest, grant_id, ticket_id, evidence, output,
    error, usage, started_at, finished_at) ON run_steps TO plm_engine_writer;
GRANT UPDATE (state, decided_at, decided_by, comment, consumed_at) ON approval_tickets TO plm_engine_writer;
GRANT UPDATE (state, begun_at, settled_at, outcome, outcome_digest) ON grants TO plm_engine_writer;
GRANT UPDATE (limit_amount, spent, reserved) ON budgets TO plm_engine_writer;
GRANT UPDATE (settled) ON reservations TO plm_engine_writer;
GRANT UPDATE (lifted_by, lifted_at) ON halts, halts_system TO plm_engine_writer;
GRANT UPDATE (result) ON idempotency_records TO plm_engine_writer;
GRANT UPDATE (tokens, updated_at) ON rate_buckets TO plm_engine_writer;
GRANT UPDATE (last_seq, last_hash) ON event_streams TO plm_engine_writer;
"""


def upgrade() -> None:
    for ddl in (RUN_STATES, RUN_STEPS, APPROVAL_TICKETS, GRANTS, BUDGETS, HALTS, IDEMPOTENCY, EVENTS):
        op.execute(ddl)
    for table in TENANT_TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant_isolation ON {table} "
            "USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid) "
            "WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)"
        )
    op.execute(GRANTS_TO_WRITER)


def downgrade() -> None:
    op.execute("DROP TABLE " + ", ".join((*reversed(TENANT_TABLES), "halts_system")))
    op.execute("DROP FUNCTION engine_refuse_change()")
