"""What the booking functions are sent, as the protocol has it: prepared under names of ours, parameters as texts.

Around an ordinary statement the driver makes a cursor and adapts every value; for a call of some hundred microseconds
on the server that is as much again on the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

PATIENCE_SECONDS = 0.25
"""Who waits for somebody's lock for longer is kept from holding others up."""

_PATIENCE = f"{PATIENCE_SECONDS * 1000:.0f}ms".encode()
_SEPARATOR = b"\x1e"  # of a JSON text sequence (RFC 7464); no JSON text has it


@dataclass(frozen=True, slots=True)
class Prepared:
    """A statement that a connection prepares under its name; its one row has one column, a JSON text."""

    name: bytes
    text: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """A prepared statement, and the values of its parameters."""

    statement: Prepared
    values: Sequence[bytes]


#: What makes one booking, and waits for locks as long as any statement does.
BOOK_PATIENTLY = "SELECT engine_book_patiently_v1({}) AS answer"

_PATIENTLY = Prepared(b"plm_book_patiently", BOOK_PATIENTLY.format("$1").encode())
_ALONE = Prepared(
    b"plm_book", b"SELECT CASE WHEN set_config('lock_timeout', $2, true) IS NOT NULL THEN engine_book_v1($1) END"
)
_ROUND = Prepared(b"plm_book_round", b"CALL engine_book_round_v1($1, $2, NULL)")


def alone(document: bytes, *, patiently: bool) -> Message:
    """Make one booking, durably."""
    return Message(_PATIENTLY, (document,)) if patiently else Message(_ALONE, (document, _PATIENCE))


def together(documents: Sequence[bytes]) -> Message:
    """Make bookings one after another, and answer a sequence when all are durable; a JSON string is an error's code."""
    return Message(_ROUND, (b"".join([_SEPARATOR + each for each in documents]), _PATIENCE))


def answers_of(result: PGresult, many: int) -> Sequence[bytes | None]:
    """The JSON texts that were answered to so many bookings.

    Raises:
        psycopg.OperationalError: there are not so many.
    """
    text = result.get_value(0, 0)
    if many == 1:
        return (text,)
    answers = (text or b"").split(_SEPARATOR)[1:]
    if len(answers) != many:
        raise psycopg.OperationalError(f"{len(answers)} answers came to {many} bookings")
    return answers


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
