"""One connection that writes batches of one tenant, through outages and around single bad records."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import psycopg

from plm_shared.ledger import LedgerRecord
from plm_shared.sqlalchemy_kernel_emitter import insert_many, refusal_of, rows_of_unknown_runs

__all__ = ["LedgerWriter"]

_CONNECTION: Final[dict[str, Any]] = {
    "application_name": "plm-ledger",
    "connect_timeout": 5,
    # A server that vanished without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_RECORD_IS_BAD: Final = ("22", "23", "54")  # data exception, constraint violation, limit exceeded
_PASSING: Final = ("08", "40", "53", "55", "57", "58")  # connection, rollback, resources, locks, intervention, system
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
_LAST_STATEMENT = 1.0  # seconds that closing waits for one
_left_to_parents: list[psycopg.Connection[Any]] = []  # never collected: closing one would end the parent's session


class LedgerWriter:
    """Writes for one thread; connects when needed, and again after a fork.

    Passing troubles are tried again, for ``patience`` seconds from the first one on: the same records again are
    replays, so a commit whose answer was lost counts once.
    """

    def __init__(self, tenant_id: str, dsn: str, *, patience: float) -> None:
        self._tenant = tenant_id
        self._dsn = dsn
        self._patience = patience
        self._connection: psycopg.Connection[Any] | None = None
        self._process = os.getpid()
        self._troubled_since: float | None = None
        self._closed = threading.Event()
        self._busy = threading.Lock()

    def write(self, records: Sequence[LedgerRecord]) -> Sequence[Exception | None]:
        """Per record None, or why it alone was refused.

        Raises:
            psycopg.Error: the database stayed away or refuses us altogether; some records may have been written.
        """
        if self._process != os.getpid():
            self._leave_to_the_parent()
        pause = _FIRST_PAUSE
        while True:
            with self._busy:
                try:
                    outcomes = self._write(records)
                except psycopg.Error as error:
                    lost = self._connection is not None and self._connection.closed
                    self._disconnect()
                    if not (lost or _passing(error)) or self._out_of_patience() or self._closed.is_set():
                        raise
                else:
                    self._troubled_since = None
                    return outcomes
            self._closed.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def close(self) -> None:
        """Stop waiting for the database, and close the connection unless a statement is still on its way."""
        self._closed.set()
        if self._process == os.getpid() and self._busy.acquire(timeout=_LAST_STATEMENT):
            self._disconnect()
            self._busy.release()

    def _write(self, records: Sequence[LedgerRecord]) -> Sequence[Exception | None]:
        connection = self._connected()
        try:
            return insert_many(connection, self._tenant, records)
        except psycopg.Error as error:
            if (error.sqlstate or "")[:2] not in _RECORD_IS_BAD:
                raise
            if len(records) == 1:
                return [refusal_of(error, self._tenant, records[0])]
            if (error.diag.constraint_name or "").endswith("_tenant_id_fkey"):
                return [refusal_of(error, self._tenant, record) for record in records]
            suspects = set[int]()
            if (error.diag.constraint_name or "").endswith("_run_id_fkey"):
                suspects = rows_of_unknown_runs(connection, self._tenant, records)
        return self._apart(records, suspects)

    def _apart(self, records: Sequence[LedgerRecord], suspects: set[int]) -> Sequence[Exception | None]:
        """Keep the suspects from the rest; with none, or only such, halve."""
        if not 0 < len(suspects) < len(records):
            middle = len(records) // 2
            return [*self._write(records[:middle]), *self._write(records[middle:])]
        outcomes: dict[int, Exception | None] = {}
        for places in ([place for place in range(len(records)) if place not in suspects], sorted(suspects)):
            outcomes |= zip(places, self._write([records[place] for place in places]), strict=True)
        return [outcomes[place] for place in range(len(records))]

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, autocommit=True, **_CONNECTION)
        return self._connection

    def _leave_to_the_parent(self) -> None:
        if self._connection is not None:
            _left_to_parents.append(self._connection)
        self._connection, self._process, self._busy = None, os.getpid(), threading.Lock()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _out_of_patience(self) -> bool:
        now = time.monotonic()
        if self._troubled_since is None:
            self._troubled_since = now
        return now - self._troubled_since >= self._patience


def _passing(error: psycopg.Error) -> bool:
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate[:2] in _PASSING
