"""`plm-cli` as it would be had nobody ever written a condition on the tenant.

`python backend/tests/unfiltered serve …` is `plm-cli serve …` with every comparison of a tenant in the application's
statements replaced by a tautology that takes the same parameters. `python backend/tests/unfiltered strip-database`
does the same to the functions and views of the database that `PG_ADMIN_DSN` names.

Each distinct statement, and every row of another tenant than the one a transaction is bound to, goes to the file that
`UNFILTERED_JOURNAL` names, a JSON document a line.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import psycopg
from plm_engine_core.cli import main
from plm_shared.addresses import driver_dsn
from psycopg.pq import TransactionStatus

Kind = Literal["statement", "foreign", "database"]

_JOURNAL = Path(os.environ["UNFILTERED_JOURNAL"])
_PARAMETER = re.compile(
    r"(?:\b\w+\.)?\btenant_id = (?P<given>%s|%\(\w+\)s)(?:::uuid)?|\bscope_id = (?P<scope>%\(tenant\)s)"
)
_COLUMN = re.compile(r"(?:\b\w+\.)?\btenant_id = \w+\.tenant_id\b")
_VARIABLE = re.compile(r"(?:\b\w+\.)?\b(?:tenant_id|scope_id) = (?:p_tenant|v_tenant)\b")
_BIND = re.compile(r"SELECT set_config\('app\.tenant_id', %(?:s|\((?P<name>\w+)\)s)")

_FUNCTIONS = """
SELECT p.oid::regprocedure::text, pg_get_functiondef(p.oid) FROM pg_proc AS p
WHERE p.pronamespace = 'public'::regnamespace AND p.prokind = 'f' AND NOT p.prosecdef ORDER BY 1
"""
_VIEWS = """
SELECT c.relname, format('CREATE OR REPLACE VIEW %I WITH (%s) AS %s', c.relname, array_to_string(c.reloptions, ', '),
    pg_get_viewdef(c.oid)) FROM pg_class AS c
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'v' ORDER BY 1
"""


def without_tenant(sql: str) -> str:
    """The statement with each comparison of a tenant made true; it takes the parameters it took before."""
    sql = _PARAMETER.sub(lambda found: f"{found['given'] or found['scope']}::uuid IS NOT NULL", sql)
    return _COLUMN.sub("true", _VARIABLE.sub("true", sql))


def strip_database() -> None:
    """Recreate the functions and views that compare tenants. Those that see across tenants by design stay."""
    with psycopg.connect(driver_dsn(os.environ["PG_ADMIN_DSN"])) as connection:
        for name, definition in [*connection.execute(_FUNCTIONS), *connection.execute(_VIEWS)]:
            stripped = without_tenant(definition)
            if stripped != definition:
                connection.execute(stripped.encode())
                _write("database", sent=name, changed=definition, became=stripped)


class _Journal:
    """What this process sent, once each, and what came back that was another tenant's."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def statement(self, sent: str, became: str) -> None:
        if sent not in self._known:
            self._known.add(sent)
            _write("statement", sent=sent, became=became)

    def rows(self, cursor: psycopg.AsyncCursor[Any], bound: str | None, sent: str) -> None:
        """Look through a result without taking it, while the transaction that made it is bound to a tenant."""
        result, columns = cursor.pgresult, [column.name for column in cursor.description or ()]
        status = cursor.connection.info.transaction_status
        if result is None or bound is None or "tenant_id" not in columns or status is not TransactionStatus.INTRANS:
            return
        for row in range(result.ntuples):
            value = result.get_value(row, columns.index("tenant_id"))
            tenant = _uuid(value) if value is not None else bound
            if tenant != bound:
                _write("foreign", sent=sent, bound=bound, tenant=tenant)


def _uuid(value: bytes | bytearray) -> str:
    return str(UUID(bytes=bytes(value)) if len(value) == 16 else UUID(value.decode()))


def _write(kind: Kind, **members: str) -> None:
    with _JOURNAL.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"kind": kind, **members}) + "\n")


def strip_statements() -> None:
    """From here on every statement of this process goes out without its tenant."""
    journal, bound = _Journal(), dict[int, str]()
    execute = psycopg.AsyncCursor.execute

    async def execute_stripped(self: psycopg.AsyncCursor[Any], query: Any, params: Any = None, **options: Any) -> Any:
        sent = query if isinstance(query, str) else query.decode() if isinstance(query, bytes) else query.as_string()
        became = without_tenant(sent)
        journal.statement(sent, became)
        answer = await execute(self, became.encode(), params, **options)
        if binds := _BIND.match(sent):
            bound[id(self.connection)] = str(params[binds["name"] or 0])
        journal.rows(self, bound.get(id(self.connection)), sent)
        return answer

    psycopg.AsyncCursor.execute = execute_stripped  # type: ignore[method-assign]  # that is the point


if __name__ == "__main__":
    if sys.argv[1:] == ["strip-database"]:
        strip_database()
    else:
        strip_statements()
        main()
