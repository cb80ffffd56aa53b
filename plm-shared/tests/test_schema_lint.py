"""The lint finds each kind of hole, and none in our own schema."""

from __future__ import annotations

import psycopg
import pytest
from plm_shared.addresses import DatabaseUrls
from plm_shared.schema_lint import lint

pytestmark = pytest.mark.every_postgres

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

HOLES = {
    "ALTER TABLE good DISABLE ROW LEVEL SECURITY": {"row-level security"},
    "ALTER TABLE good NO FORCE ROW LEVEL SECURITY": {"row-level security"},
    "DROP POLICY tenant_isolation ON good": {"policy"},
    "ALTER POLICY tenant_isolation ON good USING (true)": {"policy"},
    "CREATE POLICY generous ON good USING (true)": {"policy"},
    "ALTER POLICY tenant_isolation ON good TO plm_app": {"policy"},
    "ALTER TABLE good ADD COLUMN code text UNIQUE": {"unique key"},
    "CREATE UNIQUE INDEX ON good (lower(id::text), tenant_id)": {"unique key"},
    "ALTER TABLE good DROP CONSTRAINT good_pkey; ALTER TABLE good ALTER COLUMN tenant_id DROP NOT NULL": {
        "tenant column"
    },
    "ALTER TABLE good ADD COLUMN other uuid, ADD FOREIGN KEY (tenant_id, other) REFERENCES good": {"foreign key index"},
    "CREATE TABLE child (tenant_id uuid NOT NULL, good_tenant uuid, good_id uuid,"
    " FOREIGN KEY (good_tenant, good_id) REFERENCES good); CREATE INDEX ON child (good_tenant, good_id)": {
        "foreign key",
        "policy",
        "row-level security",
    },
    "CREATE VIEW peek AS SELECT * FROM good": {"view"},
    "CREATE MATERIALIZED VIEW peek AS SELECT * FROM good": {"view"},
    "CREATE FUNCTION act() RETURNS int LANGUAGE sql AS 'SELECT 1'": {"function"},
    "CREATE FUNCTION act() RETURNS int LANGUAGE sql SET search_path = public AS 'SELECT 1'": {"function"},
    "CREATE FUNCTION act() RETURNS int LANGUAGE sql SET search_path = pg_catalog, pg_temp AS 'SELECT 1';"
    "GRANT EXECUTE ON FUNCTION act TO PUBLIC": {"grant to everybody"},
    "CREATE PROCEDURE act() LANGUAGE sql AS 'SELECT 1'": {"function"},
    "CREATE PROCEDURE engine_book_round_v1(text, text, INOUT text) LANGUAGE sql SECURITY DEFINER AS 'SELECT $1'": {
        "function"
    },
    "CREATE FUNCTION engine_book_round_v1(text, text, text) RETURNS text LANGUAGE sql AS 'SELECT $1'": {"function"},
    "CREATE PROCEDURE engine_book_round_v1(text, text) LANGUAGE sql AS 'SELECT $1'": {"function"},
    "GRANT SELECT ON good TO PUBLIC": {"grant to everybody"},
    "GRANT SELECT (id) ON good TO PUBLIC": {"grant to everybody"},
    "GRANT USAGE ON SCHEMA public TO PUBLIC": {"grant to everybody"},
}


def test_our_own_schema_has_no_finding(kernel_database: DatabaseUrls) -> None:
    assert lint(kernel_database.app) == []


def test_a_procedure_that_commits_is_exempt_by_its_whole_name(kernel_database: DatabaseUrls) -> None:
    with psycopg.connect(kernel_database.owner) as connection:
        connection.execute("CREATE PROCEDURE engine_book_round_v1(text, text, INOUT text) LANGUAGE sql AS 'SELECT $1'")
    assert lint(kernel_database.owner) == []


def test_a_table_by_the_rules_has_no_finding(kernel_database: DatabaseUrls) -> None:
    with psycopg.connect(kernel_database.owner) as connection:
        connection.execute(GOOD)
    assert lint(kernel_database.owner) == []


@pytest.mark.parametrize("hole", HOLES, ids=lambda hole: hole[:50])
def test_each_hole_is_found_under_its_rule(kernel_database: DatabaseUrls, hole: str) -> None:
    with psycopg.connect(kernel_database.owner) as connection:
        connection.execute(GOOD)
        connection.execute(hole)
    assert {finding.rule for finding in lint(kernel_database.owner)} == HOLES[hole]


def test_a_named_exemption_lifts_only_the_tenant_rules(kernel_database: DatabaseUrls) -> None:
    with psycopg.connect(kernel_database.owner) as connection:
        connection.execute("CREATE TABLE settings (name text PRIMARY KEY); GRANT SELECT ON settings TO PUBLIC")
    assert {finding.rule for finding in lint(kernel_database.owner, exempt_tables={"settings"})} == {
        "grant to everybody"
    }


def test_an_application_role_with_more_rights_is_found(kernel_database: DatabaseUrls) -> None:
    with psycopg.connect(kernel_database.admin, autocommit=True) as connection:
        connection.execute("GRANT plm_migrator TO plm_app")
        try:
            assert [finding.problem for finding in lint(kernel_database.owner)] == ["is a member of plm_migrator"]
        finally:
            connection.execute("REVOKE plm_migrator FROM plm_app")
