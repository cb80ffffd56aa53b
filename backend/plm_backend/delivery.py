"""The delivery engine's schema: Procrastinate in a schema of its own, with one function of ours in front.

Applied by `plm-cli db upgrade` through the entry-point group `plm.migrations`. Only *delivery* is left to it: its
retries and locks are off, and its jobs carry nothing but a tenant and a run.
"""

from __future__ import annotations

import psycopg
from plm_shared.addresses import driver_dsn
from procrastinate.schema import SchemaManager

SCHEMA = "delivery"
QUEUE = "drive"
TASK = "drive_run"
VERSION = "procrastinate-3"

_ENQUEUE = f"""
CREATE OR REPLACE FUNCTION {SCHEMA}.enqueue_drive_v1(p_tenant uuid, p_run uuid) RETURNS void
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = {SCHEMA}, pg_catalog, pg_temp AS $$
    SELECT procrastinate_defer_jobs_v1(ARRAY[ROW(
        '{QUEUE}', '{TASK}', 0, NULL, NULL, jsonb_build_object('tenant_id', p_tenant, 'run_id', p_run), NULL
    )::procrastinate_job_to_defer_v1])
$$
"""  # names of ours, no input

_PIN_SEARCH_PATH = f"""
DO $$
DECLARE f regprocedure;
BEGIN
    FOR f IN SELECT p.oid::regprocedure FROM pg_proc AS p WHERE p.pronamespace = '{SCHEMA}'::regnamespace LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = {SCHEMA}, pg_catalog, pg_temp', f);
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f);
    END LOOP;
END
$$
"""  # noqa: S608  # names of ours, no input

_GRANTS = f"""
GRANT USAGE ON SCHEMA {SCHEMA} TO plm_engine_writer;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {SCHEMA} TO plm_engine_writer;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA {SCHEMA} TO plm_engine_writer;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {SCHEMA} TO plm_engine_writer;
COMMENT ON SCHEMA {SCHEMA} IS '{VERSION}'
"""


def revisions() -> list[str]:
    """What this installation can apply."""
    return [VERSION]


def current(dsn: str) -> str | None:
    """What is applied, or None."""
    with psycopg.connect(driver_dsn(dsn)) as connection:
        row = connection.execute(
            "SELECT obj_description(oid, 'pg_namespace') FROM pg_namespace WHERE nspname = %s", [SCHEMA]
        ).fetchone()
        return str(row[0]) if row and row[0] else None


def upgrade(dsn: str, revision: str = "head") -> None:  # noqa: ARG001  # one revision exists; the name is the group's
    """Apply the schema in one transaction, unless it is there.

    The engine's functions name their tables unqualified, so each gets a pinned search path; then a call inside a
    transaction of ours commits or rolls back with it, whatever that transaction's own search path is.
    """
    with psycopg.connect(driver_dsn(dsn)) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('plm/delivery', 0))")
        row = connection.execute(
            "SELECT obj_description(oid, 'pg_namespace') FROM pg_namespace WHERE nspname = %s", [SCHEMA]
        ).fetchone()
        if row is not None and row[0] == VERSION:
            return
        for statement in _statements():
            connection.execute(statement.encode())


def sql_for(*, since: str | None = None) -> str:
    """The statements of ``upgrade``, as one transaction for whoever runs them by hand."""
    if since == VERSION:
        return ""
    return "".join(f"{each.rstrip()};\n\n" for each in ("BEGIN", *_statements(), "COMMIT"))


def _statements() -> tuple[str, ...]:
    begin = (f"CREATE SCHEMA {SCHEMA}", f"SET LOCAL search_path = {SCHEMA}, pg_catalog")
    return (*begin, SchemaManager.get_schema(), _ENQUEUE, _PIN_SEARCH_PATH, _GRANTS)


def downgrade(dsn: str, revision: str = "base") -> None:  # noqa: ARG001  # as for upgrade
    """Remove the schema with every undelivered job; recovery enqueues them anew."""
    with psycopg.connect(driver_dsn(dsn)) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE".encode())
