"""Is every tenant kept apart in this database? Looks at the catalogue, then tries to get across as two tenants.

Everything it finds comes with the statement that mends it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import errors, sql

from plm_shared.addresses import driver_dsn
from plm_shared.schema_lint import EXEMPT_SCHEMAS, EXEMPT_TABLES, Finding, lint

__all__ = ["Diagnosis", "doctor_tenancy"]

_MINE: Final = "tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid"
_TENANT_TABLES: Final = """
    SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v') AND n.nspname NOT LIKE 'pg\\_%%' AND n.nspname <> 'information_schema'
        AND n.nspname <> ALL (%s) AND c.relname <> ALL (%s)
        AND has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE')
        AND EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id')
    ORDER BY 1, 2
"""


@dataclass(frozen=True, kw_only=True, order=True)
class Diagnosis:
    """One thing that is wrong, and the statement that mends it."""

    rule: str
    name: str
    problem: str
    remedy: str


def doctor_tenancy(admin_dsn: str, app_dsn: str) -> list[Diagnosis]:
    """Everything that could let one tenant see or write another's rows, sorted; empty when all is well.

    ``admin_dsn`` is any login that may read the catalogue; ``app_dsn`` must be the application's, for the probes show
    only what that login may do. Every probe is rolled back, so nothing is changed.

    Raises:
        psycopg.OperationalError: one of the addresses cannot be reached.
    """
    found = [_diagnosed(finding) for finding in lint(admin_dsn)]
    with psycopg.connect(driver_dsn(app_dsn), autocommit=True) as connection:
        found += _login(connection)
        found += _probed(connection)
    return sorted(set(found))


def _login(connection: psycopg.Connection[Any]) -> Iterator[Diagnosis]:
    row = connection.execute(
        "SELECT current_user, rolsuper, rolbypassrls, EXISTS (SELECT FROM pg_class WHERE relowner = r.oid)"
        " FROM pg_roles AS r WHERE rolname = current_user"
    ).fetchone()
    name, superuser, bypasses, owns = row or ("?", True, True, True)
    if superuser or bypasses:
        remedy = f"ALTER ROLE {_quoted(name)} NOSUPERUSER NOBYPASSRLS"
        yield Diagnosis(
            rule="application login", name=name, problem="is not bound by row-level security", remedy=remedy
        )
    if owns:
        remedy = f"REASSIGN OWNED BY {_quoted(name)} TO plm_owner"
        yield Diagnosis(
            rule="application login", name=name, problem="owns tables, whose policies it may drop", remedy=remedy
        )


def _probed(connection: psycopg.Connection[Any]) -> Iterator[Diagnosis]:
    """As no tenant, as the empty one, and as a tenant that does not exist: no row of anybody must show."""
    exempt = [*EXEMPT_TABLES]
    tables = connection.execute(_TENANT_TABLES, (list(EXEMPT_SCHEMAS), exempt)).fetchall()
    tenants = [row[0] for row in connection.execute("SELECT id FROM tenants ORDER BY id LIMIT 2").fetchall()]
    one, other = (*tenants, uuid.uuid4(), uuid.uuid4())[:2]
    for schema, table in tables:
        name = sql.Identifier(schema, table)
        strangers = {
            "no tenant": (None, "true"),
            "the empty tenant": ("", "true"),
            "a tenant that does not exist": (str(uuid.uuid4()), "true"),
            f"tenant {one}": (str(one), "tenant_id <> NULLIF(current_setting('app.tenant_id', true), '')::uuid"),
            f"tenant {other}": (str(other), "tenant_id <> NULLIF(current_setting('app.tenant_id', true), '')::uuid"),
        }
        for who, (tenant, foreign) in strangers.items():
            query = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE {})").format(name, sql.SQL(foreign))  # type: ignore[arg-type,unused-ignore]
            answer = _tried(connection, tenant, lambda query=query: connection.execute(query).fetchone())  # type: ignore[misc]
            if answer != (False,):
                said = "sees rows of others" if answer == (True,) else f"gets an error instead of no rows: {answer}"
                yield Diagnosis(rule="probe", name=str(table), problem=f"{who} {said}", remedy=_restore(schema, table))


def _tried(connection: psycopg.Connection[Any], tenant: str | None, act: Callable[[], Any]) -> Any:
    with connection.transaction(force_rollback=True):
        if tenant is not None:
            connection.execute("SELECT set_config('app.tenant_id', %s, true)", (tenant,))
        try:
            with connection.transaction():
                return act()
        except errors.Error as error:
            return f"{error.sqlstate} {error.diag.message_primary}"


def _diagnosed(finding: Finding) -> Diagnosis:
    return Diagnosis(
        rule=finding.rule,
        name=finding.name,
        problem=finding.problem,
        remedy=_remedy(finding.rule, finding.name, finding.problem),
    )


def _remedy(rule: str, name: str, problem: str) -> str:
    table = _quoted(name.partition(".")[0])
    first = problem.split(" ", 1)[0]
    match rule:
        case "tenant column":
            return f"ALTER TABLE {table} ADD COLUMN tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE"
        case "row-level security":
            return f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; ALTER TABLE {table} FORCE ROW LEVEL SECURITY"
        case "policy":
            return _restore("public", name)
        case "unique key":
            return f"CREATE UNIQUE INDEX CONCURRENTLY ON {table} (tenant_id, ...); DROP INDEX {first}"
        case "foreign key":
            return f"ALTER TABLE {table} DROP CONSTRAINT {first}, ADD FOREIGN KEY (tenant_id, ...) REFERENCES ..."
        case "foreign key index":
            return f"CREATE INDEX CONCURRENTLY ON {table} (<the columns of {first}>)"
        case "view" if "materialised" in problem:
            return f"DROP MATERIALIZED VIEW {table}"
        case "view":
            return f"ALTER VIEW {table} SET (security_invoker = true)"
        case "function":
            return f"ALTER FUNCTION {table} SET search_path = pg_catalog, public, pg_temp"
        case "grant to everybody":
            return _revoke(name, problem)
        case _:
            return _bind_application(name, problem)


def _revoke(name: str, problem: str) -> str:
    right = problem.removeprefix("everybody has ").removesuffix(" on it")
    relation, _, column = name.partition(".")
    if right in ("CONNECT", "TEMPORARY"):
        return f"REVOKE {right} ON DATABASE {_quoted(name)} FROM PUBLIC"
    if right in ("CREATE", "USAGE"):
        return f"REVOKE {right} ON SCHEMA {_quoted(name)} FROM PUBLIC"
    if right == "EXECUTE":
        return f"REVOKE EXECUTE ON FUNCTION {_quoted(name)} FROM PUBLIC"
    columns = f" ({_quoted(column)})" if column else ""
    return f"REVOKE {right}{columns} ON {_quoted(relation)} FROM PUBLIC"


def _bind_application(name: str, problem: str) -> str:
    if problem.startswith("is a member of "):
        return f"REVOKE {problem.removeprefix('is a member of ')} FROM {_quoted(name)}"
    if problem.startswith("belongs to"):
        return f"ALTER TABLE {_quoted(name)} OWNER TO plm_owner"
    return f"ALTER ROLE {_quoted(name)} NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOCREATEDB"


def _restore(schema: str, table: str) -> str:
    name = f"{_quoted(schema)}.{_quoted(table)}"
    return (
        f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY; ALTER TABLE {name} FORCE ROW LEVEL SECURITY;"
        f" DROP POLICY IF EXISTS tenant_isolation ON {name};"
        f" CREATE POLICY tenant_isolation ON {name} USING ({_MINE}) WITH CHECK ({_MINE})"
    )


def _quoted(name: str) -> str:
    return name if name.isidentifier() and name.islower() else '"' + name.replace('"', '""') + '"'
