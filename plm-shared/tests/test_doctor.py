"""The doctor finds nothing in a healthy database, and for each illness names a statement that cures it."""

from __future__ import annotations

import uuid

import psycopg
import pytest
from plm_shared.addresses import DatabaseUrls
from plm_shared.doctor import doctor_tenancy

ILLNESSES = {
    "row-level security": "ALTER TABLE llm_calls NO FORCE ROW LEVEL SECURITY",
    "policy": "DROP POLICY tenant_isolation ON llm_calls; CREATE POLICY tenant_isolation ON llm_calls USING (true)",
    "view": "ALTER VIEW mcrc_v1_view RESET (security_invoker)",
    "grant to everybody": "GRANT SELECT ON runs TO PUBLIC",
    "foreign key index": "DROP INDEX ix_llm_calls_run_id",
    "function": "ALTER FUNCTION guard_cost_status RESET search_path",
}


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
        if rule == "foreign key index":
            return  # the columns are for a human to fill in
        for each in found:
            connection.execute(each.remedy.encode())
    assert doctor_tenancy(kernel_database.owner, kernel_database.app) == []


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
        connection.execute(probe.remedy.encode())
    assert doctor_tenancy(kernel_database.owner, kernel_database.app) == []


def test_a_login_that_is_not_bound_is_found_out(kernel_database: DatabaseUrls) -> None:
    found = doctor_tenancy(kernel_database.admin, kernel_database.admin)
    assert "is not bound by row-level security" in {each.problem for each in found}
