"""The statement that mends what `schema_lint` or a probe found, complete enough to be run as it is.

PostgreSQL writes the statements that depend on its catalogue: it knows the columns and how to quote them.
"""

from __future__ import annotations

import re
from typing import Any, Final

import psycopg

from plm_shared.schema_lint import Finding

__all__ = ["close_to_others", "quoted", "remedy_of"]

_MINE: Final = "tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid"
_POLICY: Final = f"CREATE POLICY tenant_isolation ON %s USING ({_MINE}) WITH CHECK ({_MINE})".replace("'", "''")

_CLOSE: Final = f"""
    SELECT CASE WHEN c.relkind = 'v' THEN format('ALTER VIEW %%s SET (security_invoker = true)', t.name)
    ELSE format('ALTER TABLE %%s ENABLE ROW LEVEL SECURITY; ALTER TABLE %%1$s FORCE ROW LEVEL SECURITY; ', t.name)
        || coalesce((SELECT string_agg(format('DROP POLICY %%I ON %%s; ', p.polname, t.name), '' ORDER BY p.polname)
                     FROM pg_policy AS p WHERE p.polrelid = c.oid AND p.polpermissive), '')
        || format('{_POLICY.replace("%s", "%%s")}', t.name)
    END
    FROM pg_class AS c, LATERAL (SELECT c.oid::regclass AS name) AS t WHERE c.oid = to_regclass(%(table)s)
"""  # noqa: S608 - our own constants
_FROM_THE_CATALOGUE: Final = {
    "policy": _CLOSE,
    "tenant column": """
        SELECT CASE a.atttypid
            WHEN 'uuid'::regtype THEN format('ALTER TABLE %%s ALTER COLUMN tenant_id SET NOT NULL', c.oid::regclass)
            ELSE format('DROP POLICY IF EXISTS tenant_isolation ON %%s; ALTER TABLE %%1$s ALTER COLUMN tenant_id'
                ' TYPE uuid USING tenant_id::text::uuid, ALTER COLUMN tenant_id SET NOT NULL', c.oid::regclass)
        END
        FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'tenant_id'
        WHERE c.oid = to_regclass(%(table)s)
        UNION ALL SELECT format('ALTER TABLE %%s ADD COLUMN tenant_id uuid NOT NULL REFERENCES tenants (id)'
            ' ON DELETE CASCADE; CREATE INDEX CONCURRENTLY ON %%1$s (tenant_id)', to_regclass(%(table)s))
        LIMIT 1
    """,
    "unique key": """
        SELECT format('CREATE UNIQUE INDEX CONCURRENTLY ON %%s (tenant_id, %%s)%%s; ', i.indrelid::regclass, columns,
                ' WHERE ' || pg_get_expr(i.indpred, i.indrelid))
            || CASE WHEN k.conname IS NULL THEN format('DROP INDEX CONCURRENTLY %%s', i.indexrelid::regclass)
                    ELSE format('ALTER TABLE %%s DROP CONSTRAINT %%I', i.indrelid::regclass, k.conname) END
        FROM pg_index AS i LEFT JOIN pg_constraint AS k ON k.conindid = i.indexrelid AND k.contype IN ('p', 'u'),
        LATERAL (
            SELECT string_agg(definition, ', ' ORDER BY place) AS columns
            FROM generate_series(1, i.indnkeyatts) AS place,
            LATERAL (SELECT pg_get_indexdef(i.indexrelid, place, true) AS definition) AS each
            WHERE definition <> 'tenant_id'
        ) AS old
        WHERE i.indexrelid = to_regclass(%(key)s)
    """,
    "foreign key": """
        SELECT format('ALTER TABLE %%s DROP CONSTRAINT %%I,'
            ' ADD FOREIGN KEY (tenant_id%%s) REFERENCES %%s (tenant_id%%s)', f.conrelid::regclass, f.conname,
            string_agg(format(', %%I', ours.attname), '' ORDER BY place), f.confrelid::regclass,
            string_agg(format(', %%I', theirs.attname), '' ORDER BY place))
        FROM pg_constraint AS f, unnest(f.conkey, f.confkey) WITH ORDINALITY AS pair (our, their, place)
        JOIN pg_attribute AS ours ON ours.attnum = our JOIN pg_attribute AS theirs ON theirs.attnum = their
        WHERE f.conrelid = to_regclass(%(table)s) AND f.conname = %(key)s AND theirs.attname <> 'tenant_id'
            AND ours.attrelid = f.conrelid AND theirs.attrelid = f.confrelid
        GROUP BY f.conrelid, f.conname, f.confrelid
    """,
    "foreign key index": """
        SELECT format('CREATE INDEX CONCURRENTLY ON %%s (%%s)', f.conrelid::regclass, string_agg(
            format('%%I', a.attname), ', ' ORDER BY a.attname <> 'tenant_id', array_position(f.conkey, a.attnum)))
        FROM pg_constraint AS f JOIN pg_attribute AS a ON a.attrelid = f.conrelid
            AND (a.attnum = ANY (f.conkey) OR a.attname = 'tenant_id')
        WHERE f.conrelid = to_regclass(%(table)s) AND f.conname = %(key)s
        GROUP BY f.conrelid
    """,
}


_KEY_OF: Final = re.compile(" (?:does not begin with|has no index that begins with) ")  # its name comes before


def remedy_of(connection: psycopg.Connection[Any], finding: Finding) -> str:
    """The statements, separated by semicolons, that end this finding; run them as the owner, outside a transaction."""
    table = quoted(finding.name.partition(".")[0])
    match finding.rule:
        case rule if rule in _FROM_THE_CATALOGUE:
            return _written(connection, rule, table=table, key=_KEY_OF.split(finding.problem)[0])
        case "row-level security":
            return f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; ALTER TABLE {table} FORCE ROW LEVEL SECURITY"
        case "view" if "materialised" in finding.problem:
            return f"DROP MATERIALIZED VIEW {table}"
        case "view":
            return f"ALTER VIEW {table} SET (security_invoker = true)"
        case "function":
            return f"ALTER ROUTINE {table} SET search_path = pg_catalog, public, pg_temp"
        case "grant to everybody":
            return _revoke(finding.name, finding.problem)
        case _:
            return _bind_application(finding.name, finding.problem)


def close_to_others(connection: psycopg.Connection[Any], schema: str, table: str) -> str:
    """The statements that leave a table only its documented policy, or let a view ask with its reader's rights."""
    return _written(connection, "policy", table=f"{quoted(schema)}.{quoted(table)}", key="")


def quoted(name: str) -> str:
    """The name as SQL text."""
    return name if name.isidentifier() and name.isascii() and name.islower() else '"' + name.replace('"', '""') + '"'


def _written(connection: psycopg.Connection[Any], rule: str, *, table: str, key: str) -> str:
    row = connection.execute(_FROM_THE_CATALOGUE[rule].encode(), {"table": table, "key": key}).fetchone()
    return str(row[0]) if row else f"-- {table} has changed meanwhile: look again"


def _revoke(name: str, problem: str) -> str:
    right = problem.removeprefix("everybody has ").removesuffix(" on it")
    relation, _, column = name.partition(".")
    if right in ("CONNECT", "TEMPORARY"):
        return f"REVOKE {right} ON DATABASE {quoted(name)} FROM PUBLIC"
    if right in ("CREATE", "USAGE"):
        return f"REVOKE {right} ON SCHEMA {quoted(name)} FROM PUBLIC"
    if right == "EXECUTE":
        return f"REVOKE EXECUTE ON FUNCTION {quoted(name)} FROM PUBLIC"
    columns = f" ({quoted(column)})" if column else ""
    return f"REVOKE {right}{columns} ON {quoted(relation)} FROM PUBLIC"


def _bind_application(name: str, problem: str) -> str:
    if problem.startswith("is a member of "):
        return f"REVOKE {problem.removeprefix('is a member of ')} FROM {quoted(name)}"
    if problem.startswith("belongs to"):
        return f"ALTER TABLE {quoted(name)} OWNER TO plm_owner"
    return f"ALTER ROLE {quoted(name)} NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOCREATEDB"
