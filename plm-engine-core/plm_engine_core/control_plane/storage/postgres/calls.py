"""Calls of the booking functions, as the protocol has them: prepared under names of ours, parameters as texts.

Around an ordinary statement the driver makes a cursor and adapts every value; for a call of some hundred microseconds
on the server that is as much again on the client.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import psycopg
from plm_shared.sqlalchemy_kernel_emitter import Statement
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

_PARAMETER = re.compile(r"%\((\w+)\)s")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A statement that connections prepare under its name, and the names of its parameters in their order."""

    name: bytes
    text: bytes
    parameters: tuple[str, ...] = ()


class Call(NamedTuple):
    """A statement, the same for whose commit nobody waits, and the values of their parameters."""

    durable: Prepared
    unawaited: Prepared
    values: Sequence[bytes]


#: Waits for the disk, and so for all that was committed before. A transaction that writes nothing would not.
FLUSH = Prepared(b"plm_flush", b"SELECT pg_logical_emit_message(true, 'plm', '') IS NOT NULL")


def call_of(statement: Statement) -> Call:
    """A statement of the form ``SELECT expression AS answer``, with its parameters.

    Raises:
        psycopg.DataError, UnicodeEncodeError: a text cannot be stored.
    """
    durable, unawaited = _forms(statement.sql)
    values = [str(statement.params[name]).encode() for name in durable.parameters]
    if b"\0" in b"".join(values):
        raise psycopg.DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes")
    return Call(durable, unawaited, values)


@lru_cache(maxsize=64)
def _forms(sql: str) -> tuple[Prepared, Prepared]:
    names = tuple(dict.fromkeys(_PARAMETER.findall(sql)))
    text = _PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", sql)
    # Said in the transaction, wherever in it, and in force when that commits.
    texts = text, f"{text}, set_config('synchronous_commit', 'off', true)"
    durable, unawaited = (
        Prepared(b"plm_" + sha256(each.encode()).hexdigest()[:16].encode(), each.encode(), names) for each in texts
    )
    return durable, unawaited


def answered(pgconn: PGconn) -> PQGen[PGresult]:
    """What a connection answers to all that was sent over it, for its `wait`."""
    results: list[PGresult] = yield from generators.execute(pgconn)
    return results[-1]


def failure_of(result: PGresult) -> psycopg.Error | None:
    """The error that a result tells of."""
    return error_from_result(result, encoding="utf-8") if result.status == ExecStatus.FATAL_ERROR else None


def checked(result: PGresult) -> PGresult:
    """A result that is no failure; a `psycopg.Error` where it is one."""
    if (failure := failure_of(result)) is not None:
        raise failure
    return result
