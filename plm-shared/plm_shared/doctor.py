"""Is every tenant kept apart in this database? Looks at the catalogue, then tries to get across as two tenants.

Everything it finds comes with the statement that mends it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import errors, sql

from plm_shared.addresses import driver_dsn
from plm_shared.schema_lint import EXEMPT_SCHEMAS, EXEMPT_TABLES, Finding, lint
from plm_shared.tenancy_remedies import close_to_others, quoted, remedy_of

__all__ = ["Diagnosis", "doctor_tenancy"]

_FOUNDATION: Final = "tenant column"  # policies and keys are built on it
_REFUSED: Final = "42501"  # insufficient_privilege, which row-level security raises too
_TENANT_TABLES: Final = """
    SELECT n.nspname, c.relname, c.relkind <> 'v' FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v') AND n.nspname NOT LIKE 'pg\\_%%' AND n.nspname <> 'information_schema'
        AND n.nspname <> ALL (%s) AND c.relname <> ALL (%s)
        AND has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE')
        AND EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id')
    ORDER BY 1, 2
"""
# The login itself, and each role that it was given: with what that one is, or may become in turn.
_LOGIN: Final = """
    WITH given AS (
        SELECT r.oid AS role, NULL::name AS by FROM pg_roles AS r WHERE rolname = current_user
        UNION ALL SELECT r.oid, granted.rolname FROM pg_auth_members AS m
        JOIN pg_roles AS granted ON granted.oid = m.roleid
        JOIN pg_roles AS r ON pg_has_role(granted.oid, r.oid, 'MEMBER')
        WHERE m.member = to_regrole(quote_ident(current_user))
    )
    SELECT current_user, by, bool_or(rolsuper OR rolbypassrls),
        bool_or(EXISTS (SELECT FROM pg_class WHERE relowner = role AND relkind IN ('r', 'p', 'v', 'm')))
    FROM given JOIN pg_roles AS r ON r.oid = role GROUP BY by ORDER BY by NULLS FIRST
"""


@dataclass(frozen=True, kw_only=True, order=True)
class Diagnosis:
    """One thing that is wrong, and the statement that mends it."""

    rule: str
    name: str
    problem: str
    remedy: str


def doctor_tenancy(admin_dsn: str, app_dsn: str) -> list[Diagnosis]:
    """Everything that could let one tenant see or write another's rows; empty when all is well.

    The remedies stand in the order in which they can be run; look again afterwards, for one illness may hide another.

    ``admin_dsn`` is any login that may read the catalogue; ``app_dsn`` must be the application's, for the probes show
    only what that login may do. Every probe is rolled back, so nothing is changed.

    Raises:
        psycopg.OperationalError: one of the addresses cannot be reached.
    """
    with psycopg.connect(driver_dsn(admin_dsn), autocommit=True) as connection:
        found = [_diagnosis(connection, finding) for finding in lint(admin_dsn)]
    with psycopg.connect(driver_dsn(app_dsn), autocommit=True) as connection:
        found += _login(connection)
        found += _probed(connection)
    return sorted(set(found), key=lambda each: (each.rule != _FOUNDATION, each))


def _diagnosis(connection: psycopg.Connection[Any], finding: Finding) -> Diagnosis:
    remedy = remedy_of(connection, finding)
    return Diagnosis(rule=finding.rule, name=finding.name, problem=finding.problem, remedy=remedy)


def _login(connection: psycopg.Connection[Any]) -> Iterator[Diagnosis]:
    """What the login is, and what it may become by ``SET ROLE``."""
    for name, role, unbound, owns in connection.execute(_LOGIN).fetchall():
        alone = role is None
        means = "" if alone else f"may become {role}, which "
        leave = f"REVOKE {quoted(role or '')} FROM {quoted(name)}"
        if unbound:
            remedy = f"ALTER ROLE {quoted(name)} NOSUPERUSER NOBYPASSRLS" if alone else leave
            problem = f"{means}is not bound by row-level security"
            yield Diagnosis(rule="application login", name=name, problem=problem, remedy=remedy)
        if owns:
            remedy = f"REASSIGN OWNED BY {quoted(name)} TO plm_owner" if alone else leave
            problem = f"{means}owns tables, whose policies it may drop"
            yield Diagnosis(rule="application login", name=name, problem=problem, remedy=remedy)


def _probed(connection: psycopg.Connection[Any]) -> Iterator[Diagnosis]:
    """As no tenant, the empty one, one that does not exist and two that do: no row of others shows or can be made."""
    tables = connection.execute(_TENANT_TABLES, (list(EXEMPT_SCHEMAS), [*EXEMPT_TABLES])).fetchall()
    tenants = [row[0] for row in connection.execute("SELECT id FROM tenants ORDER BY id LIMIT 2").fetchall()]
    one, other, nobody = (*tenants, uuid.uuid4(), uuid.uuid4(), uuid.uuid4())[:3]
    seen, strange = sql.SQL("true"), sql.SQL("tenant_id <> NULLIF(current_setting('app.tenant_id', true), '')::uuid")
    strangers = {
        "no tenant": (None, seen, one),
        "the empty tenant": ("", seen, one),
        "a tenant that does not exist": (str(nobody), seen, one),
        f"tenant {one}": (str(one), strange, other),
        f"tenant {other}": (str(other), strange, one),
    }
    for schema, table, writable in tables:
        name = sql.Identifier(schema, table)
        for who, (tenant, foreign, victim) in strangers.items():
            look = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE {})").format(name, foreign)
            write = sql.SQL("INSERT INTO {} (tenant_id) VALUES ({})").format(name, sql.Literal(victim))
            looked = _tried(connection, tenant, look)
            # The policy is checked before every constraint, so a row without its columns is enough to ask.
            written = _tried(connection, tenant, write) if writable else _REFUSED
            problems = {
                "sees rows of others": looked == "true",
                f"gets an error instead of no rows: {looked}": looked not in ("true", "false"),
                "may write rows of others": not written.startswith(_REFUSED),
            }
            for problem in [problem for problem, found in problems.items() if found]:
                remedy = close_to_others(connection, schema, table)
                yield Diagnosis(rule="probe", name=str(table), problem=f"{who} {problem}", remedy=remedy)


def _tried(connection: psycopg.Connection[Any], tenant: str | None, statement: sql.Composed) -> str:
    """What the statement answers, as text, or the error's code and sentence; nothing of it stays."""
    with connection.transaction(force_rollback=True):
        if tenant is not None:
            connection.execute("SELECT set_config('app.tenant_id', %s, true)", (tenant,))
        try:
            with connection.transaction():
                cursor = connection.execute(statement)
                row = cursor.fetchone() if cursor.description else None
                return str(row[0]).lower() if row else "done"
        except errors.Error as error:
            return f"{error.sqlstate} {error.diag.message_primary}"
