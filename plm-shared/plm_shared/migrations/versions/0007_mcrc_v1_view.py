"""The view that tells everything about a run in one row.

Each ledger is aggregated on its own, because joining them would multiply the counts. The run of a telemetry event is
a generated column: a plain comparison may use an index under row-level security, an expression on jsonb may not.
The view runs with the reader's rights, for with its owner's it would show every tenant.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        ALTER TABLE telemetry_events ADD COLUMN payload_run_id uuid GENERATED ALWAYS AS (
            CASE
                WHEN payload ->> 'run_id' ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$'
                    THEN (payload ->> 'run_id')::uuid
            END
        ) STORED
        """
    )
    op.execute("CREATE INDEX ix_telemetry_events_tenant_payload_run ON telemetry_events (tenant_id, payload_run_id)")
    op.execute(
        """
        CREATE VIEW mcrc_v1_view WITH (security_invoker = true) AS
        SELECT
            r.id AS run_id,
            r.tenant_id,
            r.created_at AS run_created_at,
            r.updated_at AS run_updated_at,
            r.actor_kind,
            r.quality_level,
            llm.call_count AS llm_call_count,
            llm.cost_eur AS llm_cost_eur,
            llm.pending_count AS llm_cost_pending_count,
            connector.call_count AS connector_call_count,
            connector.cost_eur AS connector_cost_eur,
            connector.pending_count AS connector_cost_pending_count,
            telemetry.knowledge_call_count,
            telemetry.event_count AS telemetry_event_count,
            telemetry.last_trace_id,
            telemetry.last_span_id
        FROM runs AS r
        LEFT JOIN LATERAL (
            SELECT
                count(*) AS call_count,
                coalesce(sum(c.cost_eur), 0) AS cost_eur,
                count(*) FILTER (WHERE c.cost_status = 'pending') AS pending_count
            FROM llm_calls AS c
            WHERE c.tenant_id = r.tenant_id AND c.run_id = r.id
        ) AS llm ON true
        LEFT JOIN LATERAL (
            SELECT
                count(*) AS call_count,
                coalesce(sum(c.cost_eur), 0) AS cost_eur,
                count(*) FILTER (WHERE c.cost_status = 'pending') AS pending_count
            FROM connector_calls AS c
            WHERE c.tenant_id = r.tenant_id AND c.run_id = r.id
        ) AS connector ON true
        LEFT JOIN LATERAL (
            SELECT
                count(*) AS event_count,
                count(*) FILTER (WHERE e.event_type = 'knowledge_call') AS knowledge_call_count,
                (array_agg(e.trace_id ORDER BY e.created_at DESC, e.id DESC))[1] AS last_trace_id,
                (array_agg(e.span_id ORDER BY e.created_at DESC, e.id DESC))[1] AS last_span_id
            FROM telemetry_events AS e
            WHERE e.tenant_id = r.tenant_id AND e.payload_run_id = r.id
        ) AS telemetry ON true
        """
    )


def downgrade() -> None:
    op.execute("DROP VIEW mcrc_v1_view")
    op.execute("ALTER TABLE telemetry_events DROP COLUMN payload_run_id")
