"""Approvals by several: votes, comments, approval scopes, hand-over in time, and tickets that take another's place.

The functions of version 1 stay for nodes that are not upgraded yet; what they decide has a decider and no votes.

Revision ID: 0022
Revises: 0021
"""

from __future__ import annotations

from importlib.resources import files

from alembic import op
from plm_shared.migrations.chain import send_as_written

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

FILES = ("approvals_v2", "tickets_v2")

SIGNATURES = (
    "engine_use_approval_v2(uuid, jsonb)",
    "engine_open_ticket_v2(jsonb)",
    "engine_approval_scope_v2(jsonb)",
    "engine_ticket_v2(jsonb)",
    "engine_revoke_approval_scope_v2(uuid, uuid, uuid, text)",
    "engine_comment_ticket_v2(uuid, uuid, uuid, uuid, text, text)",
    "engine_leave_approval_scope_v2(approval_tickets, text, uuid, uuid)",
    "engine_decide_ticket_v2(jsonb)",
    "engine_refused_vote_v2(approval_tickets, jsonb, jsonb)",
    "engine_time_out_tickets_v2(uuid, uuid, text)",
    "engine_time_out_ticket_v2(approval_tickets, text)",
)

TICKETS = """
ALTER TABLE approval_tickets
    ADD COLUMN escalate_seconds double precision CHECK (escalate_seconds > 0),
    ADD COLUMN escalated_at timestamptz,
    ADD COLUMN supersedes uuid,
    ADD COLUMN superseded_by uuid;
GRANT UPDATE (deadline, escalated_at, superseded_by) ON approval_tickets TO plm_engine_writer;
"""

VOTES = """
CREATE TABLE approval_votes (
    tenant_id          uuid        NOT NULL,
    ticket_id          uuid        NOT NULL,
    voter              uuid        NOT NULL,
    vote               text        NOT NULL CHECK (vote IN ('approve', 'deny')),
    comment            text        NOT NULL DEFAULT '',
    authority          text[]      NOT NULL,
    scope_uses         integer     CHECK (scope_uses > 0),
    scope_seconds      double precision CHECK (scope_seconds > 0),
    scope_any_resource boolean,
    voted_at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, ticket_id, voter),
    FOREIGN KEY (tenant_id, ticket_id) REFERENCES approval_tickets (tenant_id, id) ON DELETE CASCADE
);
CREATE TABLE approval_comments (
    tenant_id  uuid        NOT NULL,
    id         uuid        NOT NULL,
    ticket_id  uuid        NOT NULL,
    author     uuid        NOT NULL,
    body       text        NOT NULL CHECK (length(body) BETWEEN 1 AND 10000),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, ticket_id) REFERENCES approval_tickets (tenant_id, id) ON DELETE CASCADE
);
CREATE INDEX ix_approval_comments_ticket ON approval_comments (tenant_id, ticket_id, created_at, id);
"""

SCOPES = """
CREATE TABLE approval_scopes (
    tenant_id     uuid        NOT NULL,
    id            uuid        NOT NULL,
    ticket_id     uuid        NOT NULL,
    capability    text        NOT NULL,
    resource      text,
    agent         text        NOT NULL CHECK (agent <> ''),
    requested_by  uuid        NOT NULL,
    policy_digest text        NOT NULL,
    tier          text        NOT NULL,
    risk          text        NOT NULL,
    max_uses      integer     NOT NULL CHECK (max_uses > 0),
    used          integer     NOT NULL DEFAULT 0 CHECK (used >= 0),
    expires_at    timestamptz NOT NULL,
    granted_by    uuid        NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    revoked_at    timestamptz,
    revoked_by    uuid,
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, ticket_id) REFERENCES approval_tickets (tenant_id, id) ON DELETE CASCADE,
    CHECK (used <= max_uses),
    CHECK (granted_by <> requested_by)
);
CREATE INDEX ix_approval_scopes_ticket ON approval_scopes (tenant_id, ticket_id);
CREATE INDEX ix_approval_scopes_use ON approval_scopes (tenant_id, capability, agent, requested_by)
    WHERE revoked_at IS NULL;
"""

TENANT_TABLES = ("approval_votes", "approval_comments", "approval_scopes")
RIGHTS = """
GRANT SELECT, INSERT ON approval_votes, approval_comments, approval_scopes TO plm_engine_writer;
GRANT UPDATE (used, revoked_at, revoked_by) ON approval_scopes TO plm_engine_writer;
"""


def upgrade() -> None:
    for ddl in (TICKETS, VOTES, SCOPES):
        op.execute(ddl)
    for table in TENANT_TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant_isolation ON {table} "
            "USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid) "
            "WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)"
        )
    op.execute(RIGHTS)
    folder = files("plm_engine_core") / "control_plane" / "storage" / "sql"
    for name in FILES:
        send_as_written((folder / f"{name}.sql").read_text(encoding="utf-8"))
    for signature in SIGNATURES:
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO plm_engine_writer")


def downgrade() -> None:
    for signature in SIGNATURES:
        op.execute(f"DROP FUNCTION {signature}")
    op.execute("DROP TABLE " + ", ".join(reversed(TENANT_TABLES)))
    op.execute(
        "ALTER TABLE approval_tickets DROP COLUMN escalate_seconds, DROP COLUMN escalated_at, DROP COLUMN supersedes, "
        "DROP COLUMN superseded_by"
    )
