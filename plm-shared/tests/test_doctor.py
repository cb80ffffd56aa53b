"""The doctor finds nothing in a healthy database, and for each illness names a statement that cures it."""

from __future__ import annotations

import uuid
from typing import Any

import psycopg
import pytest
from plm_shared.addresses import DatabaseUrls, build_dsn
from plm_shared.doctor import doctor_tenancy
from psycopg import conninfo, sql

GOOD = """
    CREATE TABLE good (
        tenant_id uuid NOT NULL REFERENCES tenants, id uuid NOT NULL, run_id uuid REFERENCES runs,
        PRIMARY KEY (tenant_id, id)
    );
    CREATE INDEX ON good (tenant_id, run_id);
    ALTER TABLE good ENABLE ROW LEVEL SECURITY;
    ALTER TABLE good FORCE ROW LEVEL SECURITY;
    CREATE POLICY tenant_isolation ON good
        USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
        WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
"""
MALFORMED = [
    "CREATE POLICY generous ON good USING (true)",
    'ALTER TABLE good ADD COLUMN "Code" text UNIQUE',
    "CREATE UNIQUE INDEX ON good (lower(id::text), tenant_id) WHERE run_id IS NULL",
    "ALTER TABLE good DROP CONSTRAINT good_pkey; ALTER TABLE good ALTER COLUMN tenant_id DROP NOT NULL",
    "ALTER TABLE good ADD COLUMN other uuid, ADD FOREIGN KEY (tenant_id, other) REFERENCES good",
    """CREATE TABLE "Child" (tenant_id text, good_tenant uuid, "Good id" uuid,
        FOREIGN KEY (good_tenant, "Good id") REFERENCES good); CREATE INDEX ON "Child" (good_tenant, "Good id")""",
    'CREATE TABLE "Without" (n int)',
    "CREATE VIEW peek AS SELECT * FROM good",
    "CREATE MATERIALIZED VIEW peek AS SELECT * FROM good",
    "CREATE FUNCTION act() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE PROCEDURE act() LANGUAGE sql AS 'SELECT 1'",
    "GRANT SELECT (id) ON good TO PUBLIC",
    "GRANT USAGE ON SCHEMA public TO PUBLIC",
]
ILLNESSES = {
    "row-level security": "ALTER TABLE llm_calls NO FORCE ROW LEVEL SECURITY",
    "policy": "DROP POLICY tenant_isolation ON llm_calls; CREATE POLICY tenant_isolation ON llm_calls USING (true)",
    "view": "ALTER VIEW mcrc_v1_view RESET (security_invoker)",
    "grant to everybody": "GRANT SELECT ON runs TO PUBLIC",
    "foreign key index": "DROP INDEX ix_llm_calls_run_id",
    "function": "ALTER FUNCTION guard_cost_status RESET search_path",
}


def run(connection: psycopg.Connection[Any], remedy: str) -> None:
    """As an operator would: one statement after the other, for some may not share a transaction."""
    for statement in remedy.split("; "):
        connection.execute(statement.encode())


def test_a_migrated_database_is_healthy(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]
) -> None:
    assert doctor_tenancy(kernel_database.owner, kernel_database.app) == []


@pytest.mark.parametrize("rule", ILLNESSES)
def test_each_illness_is_found_with_the_statement_that_cures_it(kernel_database: DatabaseUrls, rule: str) -> None:
    with psycopg.connect(kernel_database.owner, autocommit=True) as connection:
        connection.execute(ILLNESSES[rule].encode())
        found = [each for each in doctor_tenancy(kernel_database.owner, kernel_database.app) if each.rule == rule]
        assert found
        for each in found:
            run(connection, each.remedy)
    assert doctor_tenancy(kernel_database.owner, kernel_database.app) == []


@pytest.mark.parametrize("hole", MALFORMED, ids=lambda hole: hole[:40])
def test_every_statement_it_prints_runs_as_it_is_and_in_the_end_all_is_well(
    kernel_database: DatabaseUrls, hole: str
) -> None:
    with psycopg.connect(kernel_database.owner, autocommit=True) as connection:
        connection.execute(GOOD)
        connection.execute(hole.encode())
        found = doctor_tenancy(kernel_database.owner, kernel_database.app)
        assert found
        for _ in range(3):  # a remedy may bring to light what the illness hid
            for remedy in dict.fromkeys(each.remedy for each in found):
                run(connection, remedy)
            found = doctor_tenancy(kernel_database.owner, kernel_database.app)
    assert found == []


def test_the_probe_shows_rows_that_a_broken_policy_lets_through(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]
) -> None:
    with psycopg.connect(kernel_database.owner, autocommit=True) as connection:
        for tenant in two_tenants:
            connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(tenant),))
            connection.execute(
                "INSERT INTO runs (id, tenant_id, actor_kind) VALUES (gen_random_uuid(), %s, 'agent')", (tenant,)
            )
        connection.execute("CREATE POLICY generous ON runs USING (true)")
    probes = [each for each in doctor_tenancy(kernel_database.owner, kernel_database.app) if each.rule == "probe"]
    assert {each.name for each in probes} == {"runs", "mcrc_v1_view"}
    assert any(each.problem == f"tenant {min(two_tenants)} sees rows of others" for each in probes)
    assert any(each.problem == "no tenant sees rows of others" for each in probes)
    with psycopg.connect(kernel_database.owner, autocommit=True) as connection:
        for remedy in {each.remedy for each in probes}:
            run(connection, remedy)
    assert doctor_tenancy(kernel_database.owner, kernel_database.app) == []


def test_the_probe_finds_a_table_that_may_be_written_for_others(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]
) -> None:
    with psycopg.connect(kernel_database.owner, autocommit=True) as connection:
        connection.execute("ALTER POLICY tenant_isolation ON telemetry_events WITH CHECK (true)")
        found = doctor_tenancy(kernel_database.owner, kernel_database.app)
        assert {(each.rule, each.name) for each in found} == {
            ("policy", "telemetry_events"),
            ("probe", "telemetry_events"),
        }
        assert f"tenant {min(two_tenants)} may write rows of others" in {each.problem for each in found}
        run(connection, found[0].remedy)
        assert connection.execute("SELECT count(*) FROM telemetry_events").fetchone() == (0,)
    assert doctor_tenancy(kernel_database.owner, kernel_database.app) == []


def test_a_policy_that_fails_on_an_unset_tenant_is_found(kernel_database: DatabaseUrls) -> None:
    with psycopg.connect(kernel_database.owner, autocommit=True) as connection:
        connection.execute("DROP POLICY tenant_isolation ON artifacts")
        connection.execute(
            "CREATE POLICY tenant_isolation ON artifacts USING (tenant_id = current_setting('app.tenant_id')::uuid)"
        )
        (probe, *_) = [
            each for each in doctor_tenancy(kernel_database.owner, kernel_database.app) if each.rule == "probe"
        ]
        assert probe.name == "artifacts"
        run(connection, probe.remedy)
    assert doctor_tenancy(kernel_database.owner, kernel_database.app) == []


def test_a_login_that_is_not_bound_is_found_out(kernel_database: DatabaseUrls) -> None:
    found = doctor_tenancy(kernel_database.admin, kernel_database.admin)
    assert "is not bound by row-level security" in {each.problem for each in found}


@pytest.mark.parametrize(
    ("gift", "problem"),
    [
        ("GRANT plm_migrator TO some_app", "may become plm_migrator, which is not bound by row-level security"),
        ("GRANT plm_owner TO some_app", "may become plm_owner, which owns tables, whose policies it may drop"),
        ("GRANT between TO some_app; GRANT plm_migrator TO between", "may become between, which is not bound"),
        ("GRANT CREATE ON SCHEMA public TO some_app", "owns tables, whose policies it may drop"),
    ],
)
def test_a_login_of_any_name_that_may_become_more_is_found_out(
    kernel_database: DatabaseUrls, gift: str, problem: str
) -> None:
    """The lint knows the roles of ``provision``; an operator may have made the application's login by hand."""
    with psycopg.connect(kernel_database.admin, autocommit=True) as connection:
        connection.execute("CREATE ROLE between; CREATE ROLE some_app LOGIN PASSWORD 'x' IN ROLE plm_kernel_writer")
        database = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO some_app").format(database))
        address = {name: str(value) for name, value in conninfo.conninfo_to_dict(kernel_database.app).items()}
        app = build_dsn({**address, "user": "some_app", "password": "x"})
        try:
            assert doctor_tenancy(kernel_database.owner, app) == []
            connection.execute(gift.encode())
            if "CREATE" in gift:
                with psycopg.connect(app, autocommit=True) as owning:
                    owning.execute("CREATE TABLE mine (n int)")
            found = [
                each
                for each in doctor_tenancy(kernel_database.owner, app)
                if each.rule == "application login" and each.problem.startswith(problem)
            ]
            assert len(found) == 1
            connection.execute(found[0].remedy.encode())
            left = doctor_tenancy(kernel_database.owner, app)
            assert [each for each in left if each.rule == "application login"] == []
        finally:
            connection.execute("DROP OWNED BY some_app; DROP ROLE some_app; DROP OWNED BY between; DROP ROLE between")
