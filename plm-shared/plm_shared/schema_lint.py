"""Checks a live database against the rules that keep tenants apart.

Each rule is one catalogue query that returns what breaks it. Exemptions are named here, each with its reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import psycopg

from plm_shared.addresses import driver_dsn

__all__ = ["EXEMPT_PROCEDURES", "EXEMPT_SCHEMAS", "EXEMPT_TABLES", "FROZEN_TABLES", "Finding", "lint"]

EXEMPT_TABLES: Final = {
    "tenants": "the list of tenants itself; the application may only read it",
    "halts_system": "halts of the whole system belong to no tenant",
    "audit_log_system": "a token that is refused proves no tenant",
    "policy_versions": "one policy decides for all tenants",
    "policy_activations": "one policy decides for all tenants",
}
EXEMPT_SCHEMAS: Final = {"delivery": "the delivery engine's own; its jobs carry only tenant id and run id"}
EXEMPT_PROCEDURES: Final = {
    "public.engine_book_round_v1(text, text, text)": (
        "it commits, which PostgreSQL refuses to one with settings; every name in it says its schema"
    )
}
FROZEN_TABLES: Final = (
    "tenants",
    "runs",
    "telemetry_events",
    "llm_calls",
    "connector_calls",
    "artifacts",
    "pricing_snapshots",
)
"""Tables whose keys are fixed by contract without the tenant in front; keys that refer to them are bound by that."""

_POLICY: Final = "(tenant_id = (NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid)"
_VERSION_TABLES: Final = "alembic\\_version%"

_CHECKED: Final = """
    tables AS (
        SELECT c.oid, c.relname AS name, c.relrowsecurity, c.relforcerowsecurity, c.relacl
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND n.nspname NOT LIKE 'pg\\_%%' AND n.nspname <> 'information_schema'
            AND n.nspname <> ALL (%(schemas)s) AND c.relname NOT LIKE %(version_tables)s
    ),
    tenant_tables AS (SELECT * FROM tables WHERE name <> ALL (%(exempt)s)),
    schemas AS (
        SELECT oid, nspname AS name, nspacl FROM pg_namespace
        WHERE nspname NOT LIKE 'pg\\_%%' AND nspname <> 'information_schema' AND nspname <> ALL (%(schemas)s)
    )
"""

_RULES: Final = {
    "tenant column": """
        SELECT t.name, 'has no column tenant_id uuid NOT NULL' FROM tenant_tables AS t
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = t.oid AND a.attname = 'tenant_id' AND a.atttypid = 'uuid'::regtype AND a.attnotnull
        )
    """,
    "row-level security": """
        SELECT name, 'row-level security is not both enabled and forced' FROM tenant_tables
        WHERE NOT (relrowsecurity AND relforcerowsecurity)
    """,
    "policy": """
        SELECT t.name, 'needs exactly the policy tenant_isolation in its documented form, for every command and role'
        FROM tenant_tables AS t LEFT JOIN pg_policy AS p ON p.polrelid = t.oid AND p.polpermissive
        GROUP BY t.name
        HAVING count(p.oid) <> 1 OR NOT bool_and(
            p.polname = 'tenant_isolation' AND p.polcmd = '*' AND p.polroles = '{0}'
            AND pg_get_expr(p.polqual, p.polrelid) = %(policy)s
            AND pg_get_expr(p.polwithcheck, p.polrelid) = %(policy)s
        )
    """,
    "unique key": """
        SELECT t.name, format('%%s does not begin with tenant_id', i.indexrelid::regclass)
        FROM tenant_tables AS t JOIN pg_index AS i ON i.indrelid = t.oid AND i.indisunique
        LEFT JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attnum = i.indkey[0]
        WHERE a.attname IS DISTINCT FROM 'tenant_id' AND t.name <> ALL (%(frozen)s)
    """,
    "foreign key": """
        SELECT t.name, format('%%s does not begin with tenant_id', f.conname)
        FROM tenant_tables AS t JOIN pg_constraint AS f ON f.conrelid = t.oid AND f.contype = 'f'
        JOIN pg_class AS target ON target.oid = f.confrelid
        JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attnum = f.conkey[1]
        WHERE a.attname <> 'tenant_id' AND target.relname <> ALL (%(frozen)s)
    """,
    "foreign key index": """
        SELECT t.name, format('%%s has no index that begins with its columns (tenant_id may lead)', f.conname)
        FROM tables AS t JOIN pg_constraint AS f ON f.conrelid = t.oid AND f.contype = 'f'
        LEFT JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attname = 'tenant_id'
        WHERE NOT EXISTS (
            SELECT FROM pg_index AS i
            CROSS JOIN LATERAL (VALUES (0), (CASE WHEN i.indkey[0] = a.attnum THEN 1 ELSE 0 END)) AS skip (columns)
            CROSS JOIN LATERAL (
                SELECT (i.indkey::int2[])[skip.columns : skip.columns + cardinality(f.conkey) - 1] AS columns
            ) AS led
            WHERE i.indrelid = t.oid AND i.indpred IS NULL AND i.indisvalid
                AND led.columns @> f.conkey AND led.columns <@ f.conkey
        )
    """,
    "view": """
        SELECT c.relname, CASE c.relkind WHEN 'v' THEN 'runs with its owner''s rights; add security_invoker = true'
                                         ELSE 'is materialised, which row-level security does not reach' END
        FROM pg_class AS c JOIN schemas AS s ON s.oid = c.relnamespace
        WHERE c.relkind = 'm'
            OR c.relkind = 'v' AND NOT coalesce(c.reloptions && '{security_invoker=true,security_invoker=on}', false)
    """,
    "function": """
        SELECT p.proname, 'needs SET search_path with pg_temp at its end'
        FROM pg_proc AS p JOIN schemas AS s ON s.oid = p.pronamespace
        WHERE NOT EXISTS (SELECT FROM unnest(p.proconfig) AS c WHERE c LIKE 'search\\_path=%%, pg\\_temp')
            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e')
            AND (p.prosecdef OR p.prokind <> 'p'
                OR format('%%s.%%s(%%s)', s.name, p.proname, oidvectortypes(p.proargtypes)) <> ALL (%(procedures)s))
    """,
    "grant to everybody": """
        SELECT name, format('everybody has %%s on it', privilege_type) FROM (
            SELECT c.relname AS name, acl.* FROM pg_class AS c JOIN schemas AS s ON s.oid = c.relnamespace
            CROSS JOIN LATERAL aclexplode(c.relacl) AS acl
            UNION ALL SELECT c.relname || '.' || a.attname, acl.* FROM pg_attribute AS a
            JOIN pg_class AS c ON c.oid = a.attrelid JOIN schemas AS s ON s.oid = c.relnamespace
            CROSS JOIN LATERAL aclexplode(a.attacl) AS acl
            UNION ALL SELECT p.proname, acl.* FROM pg_proc AS p JOIN schemas AS s ON s.oid = p.pronamespace
            CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS acl
            UNION ALL SELECT s.name, acl.* FROM schemas AS s CROSS JOIN LATERAL aclexplode(s.nspacl) AS acl
            UNION ALL SELECT d.datname, acl.* FROM pg_database AS d
            CROSS JOIN LATERAL aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS acl
            WHERE d.datname = current_database()
        ) AS granted
        WHERE grantee = 0
    """,
    "application role": """
        SELECT rolname, 'may do more than an application: superuser, BYPASSRLS, CREATEROLE or CREATEDB'
        FROM pg_roles WHERE rolname = 'plm_app' AND (rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb)
        UNION ALL SELECT 'plm_app', format('is a member of %%s', roleid::regrole) FROM pg_auth_members
        WHERE member = to_regrole('plm_app')
            AND roleid::regrole::text NOT IN ('plm_kernel_writer', 'plm_engine_writer')
        UNION ALL SELECT c.relname, 'belongs to the application role' FROM pg_class AS c
        WHERE c.relowner = to_regrole('plm_app') OR c.relowner IN (
            to_regrole('plm_kernel_writer'), to_regrole('plm_engine_writer'))
    """,
}


@dataclass(frozen=True, kw_only=True, order=True)
class Finding:
    """One thing that breaks a rule."""

    rule: str
    name: str
    problem: str


def lint(dsn: str, *, exempt_tables: Collection[str] = ()) -> list[Finding]:
    """Everything in the database that breaks a rule, sorted; empty when all is well.

    Tables in ``exempt_tables`` are taken out of the tenant rules in addition to ``EXEMPT_TABLES``; grants, views,
    functions and foreign key indexes are always checked. Any login that may read the catalogue will do.
    """
    values = {
        "policy": _POLICY,
        "exempt": [*EXEMPT_TABLES, *exempt_tables],
        "schemas": list(EXEMPT_SCHEMAS),
        "procedures": list(EXEMPT_PROCEDURES),
        "frozen": list(FROZEN_TABLES),
        "version_tables": _VERSION_TABLES,
    }
    findings = []
    with psycopg.connect(driver_dsn(dsn)) as connection:
        for rule, query in _RULES.items():
            rows = connection.execute(f"WITH {_CHECKED} {query}".encode(), values).fetchall()
            findings += [Finding(rule=rule, name=str(name), problem=str(problem)) for name, problem in rows]
    return sorted(findings)
