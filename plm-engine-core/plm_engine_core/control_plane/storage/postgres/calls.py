"""Calls of the booking functions: prepared once for each connection, and sent as one message.

Around an ordinary statement the driver makes a cursor and adapts every value; for a call of some hundred microseconds
on the server that is as much again on the client. And a transaction of one message cannot be left half sent: a process
that is paused keeps no row from anybody.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from plm_shared.sqlalchemy_kernel_emitter import Statement
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.errors import DuplicatePreparedStatement, InvalidSqlStatementName, error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

from plm_engine_core.control_plane.storage.postgres.gateway import Session

_NAMED = re.compile(r"%\((\w+)\)s")


class Calls:
    """Sends statements over connections that nobody else uses meanwhile, and knows which of them each has prepared."""

    def __init__(self) -> None:
        self._prepared: WeakKeyDictionary[Session, set[bytes]] = WeakKeyDictionary()

    async def run(self, connection: Session, statement: Statement) -> Any:
        """Run a statement in a transaction of its own; the JSON in the first column of the row that it answers.

        Raises:
            psycopg.Error: it failed, so nothing was written; or the connection was lost, and that is not known.
        """
        name, text, parameters = _numbered(statement.sql)
        values = [_encoded(statement.params[each]) for each in parameters]
        prepared = self._prepared.setdefault(connection, set())
        try:
            result = await self._sent(connection, name, text, values, prepared)
        except InvalidSqlStatementName:
            # The driver drops what a connection has prepared after a rollback. Nothing was run.
            prepared.clear()
            result = await self._sent(connection, name, text, values, prepared)
        answer = result.get_value(0, 0)
        return json.loads(answer.decode()) if answer is not None else None

    async def _sent(
        self, connection: Session, name: bytes, text: bytes, values: list[bytes], prepared: set[bytes]
    ) -> PGresult:
        pgconn = connection.pgconn
        if name not in prepared:
            pgconn.send_prepare(name, text)
            with suppress(DuplicatePreparedStatement):  # by a call that was cancelled before it heard so
                checked(await connection.wait(answered(pgconn)))
            prepared.add(name)
        pgconn.send_query_prepared(name, values)
        return checked(await connection.wait(answered(pgconn)))


@lru_cache(maxsize=64)
def _numbered(sql: str) -> tuple[bytes, bytes, tuple[str, ...]]:
    """A name for a statement, its text as the protocol has it, and the names of its parameters in their order."""
    names = tuple(dict.fromkeys(_NAMED.findall(sql)))
    text = _NAMED.sub(lambda found: f"${names.index(found[1]) + 1}", sql).encode()
    return b"plm_" + sha256(text).hexdigest()[:16].encode(), text, names


def _encoded(value: object) -> bytes:
    text = str(value)
    if "\0" in text:
        raise psycopg.DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes")
    return text.encode()


def answered(pgconn: PGconn) -> PQGen[PGresult]:
    """What a connection answers to all that was sent over it, for its `wait`."""
    results: list[PGresult] = yield from generators.execute(pgconn)
    return results[-1]


def checked(result: PGresult) -> PGresult:
    """A result that is no failure; a `psycopg.Error` where it is one."""
    if result.status == ExecStatus.FATAL_ERROR:
        raise error_from_result(result, encoding="utf-8")
    return result
