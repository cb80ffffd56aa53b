"""Connections bound to one tenant, and the database's errors in the control plane's own words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast
from uuid import UUID

import psycopg
from plm_shared.cancellation import kept_cancel
from plm_shared.canonical_json import JsonRefused, storable_json
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from plm_engine_core.control_plane.errors import (
    Conflict,
    ControlPlaneError,
    FencingLost,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    StorageUnavailable,
)

Pool = AsyncConnectionPool[psycopg.AsyncConnection[DictRow]]
Session = psycopg.AsyncConnection[DictRow]

_BUSY = {"25006", "25P03", "55P03", "57014", "40P01", "40001", "53300", "53100", "53200"}
_BOUND = "SELECT set_config('app.tenant_id', %s, true), set_config('lock_timeout', %s, true)"
_LONGEST_WAIT = "5s"
LONGEST_ANSWER_SECONDS = 15.0  # a server that is frozen closes no connection and ends no wait
LONGEST_WALK_SECONDS = 1800.0  # the same for what goes over all events of a tenant, of which there may be many millions


def json_parameter(value: Any, *, root: str) -> str:
    """The text of a JSON parameter, checked before anything is sent.

    Raises:
        InvalidRequest: the value holds what the database cannot store (NaN, U+0000); names the path, from `root`.
    """
    try:
        return storable_json(value, root=root)
    except JsonRefused as error:
        raise InvalidRequest(str(error), field=error.path) from error


def jsonb(value: Any, *, root: str) -> Jsonb:
    """A JSON parameter of the driver's, checked as `json_parameter` does.

    Raises:
        InvalidRequest: as there.
    """
    text = json_parameter(value, root=root)
    return Jsonb(value, dumps=lambda _: text)


def _translate(error: psycopg.Error) -> ControlPlaneError | None:
    text = error.diag.message_primary or str(error)
    match error.sqlstate:
        case "PLF01":
            return FencingLost(text)
        case "PLC01":
            return IdempotencyConflict(text)
        case "PLN01":
            return NotFound(error.diag.table_name or "object", error.diag.message_detail or "")
        case "PLS01":
            return Conflict(text, reason="state")
        case "PLI01" | "PLT01":
            return InvalidRequest(text, field="connection")
        case "23503" if "tenant" in (error.diag.constraint_name or ""):
            return NotFound("tenant", "of this request")
        case "23505":
            return Conflict(f"it exists already: {text}", reason="already_exists")
        case "0A000" if error.diag.source_function == "RevalidateCachedQuery":  # prepared before a migration
            return StorageUnavailable(f"the database was upgraded meanwhile: {text}")
        case state if (state or "").startswith("54"):  # the driver counts these among failures of operation
            return InvalidRequest(f"the database cannot hold a value of the request: {text}")
        case state if state in _BUSY or isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return StorageUnavailable(f"the database did not answer in time or is not reachable: {text}")
        case _ if isinstance(error, psycopg.DataError):
            return InvalidRequest(f"the database cannot hold a value of the request: {text}")
        case _:
            return None


def is_damage(error: psycopg.Error) -> bool:
    """Whether a stored row is what is wrong: not the connection, a wait for somebody, or the server."""
    return not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)


@contextmanager
def translated(longest: float | None = None) -> Iterator[None]:
    """Raise the control plane's errors in place of the driver's; what has none is a defect and passes.

    `longest` is how many seconds were waited for an answer, where it is another number than usual.
    """
    try:
        yield
    except psycopg.Error as error:
        known = _translate(error)
        if known is None:
            raise
        raise known from error
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"a text of the request cannot be stored: {error.reason}") from error
    except (PoolTimeout, PoolClosed) as error:
        raise StorageUnavailable("no database connection became free in time") from error
    except TimeoutError as error:
        raise StorageUnavailable(f"the database gave no answer in {longest or LONGEST_ANSWER_SECONDS:g} s") from error


class Gateway:
    """Hands out pooled connections; a transaction is bound to one tenant, and its waits for locks are bounded."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def connection(self, *, longest: float | None = None) -> AsyncIterator[Session]:
        """One pooled connection in autocommit mode, for `LONGEST_ANSWER_SECONDS` or for `longest` seconds."""
        with translated(longest), kept_cancel():
            async with asyncio.timeout(longest or LONGEST_ANSWER_SECONDS), self._pool.connection() as connection:
                yield connection

    async def borrow(self) -> Session:
        """One pooled connection in autocommit mode, to be given back; the errors are the driver's and the pool's."""
        connection: Session | None = None
        try:
            with kept_cancel():
                connection = await self._pool.getconn()
        except asyncio.CancelledError:
            if connection is not None:  # it came, and the cancel with it
                await self._pool.putconn(connection)
            raise
        return connection

    def wanted(self) -> bool:
        """Whether somebody waits for a connection."""
        return bool(self._pool.get_stats()["requests_waiting"])

    async def give_back(self, connection: Session) -> None:
        """Give back what was borrowed, on which no transaction is open; a lost one is replaced."""
        await self._pool.putconn(connection)

    @asynccontextmanager
    async def transaction(self, tenant_id: UUID, *, longest: float | None = None) -> AsyncIterator[Session]:
        """A transaction bound to `tenant_id`: committed on a clean exit, rolled back on any exception."""
        async with self.connection(longest=longest) as connection, connection.transaction():
            await connection.execute(_BOUND, [str(tenant_id), _LONGEST_WAIT])
            yield connection

    @contextmanager
    def reading(self, tenant_id: UUID) -> Iterator[psycopg.Connection[Any]]:
        """A connection of its own for a thread that reads for long, and all of it as of one instant.

        It is read-only, its transaction bound to `tenant_id`, and its waits for locks bounded too.
        """
        conninfo = cast("str", self._pool.conninfo)  # as `open_pool` gave it
        with translated(), psycopg.connect(conninfo) as connection:
            connection.read_only = True
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.execute(_BOUND, [str(tenant_id), _LONGEST_WAIT])
            yield connection

    async def append(
        self, connection: Session, tenant_id: UUID, stream: str, kind: str, actor: str, payload: dict[str, Any]
    ) -> int:
        """Append one event, under the last lock that the transaction takes, and answer its sequence."""
        cursor = await connection.execute(
            "SELECT engine_append_event_v1(%s, %s, %s, %s, %s) AS seq",
            [tenant_id, stream, kind, actor, jsonb(payload, root="event")],
        )
        row: Any = await cursor.fetchone()
        return int(row["seq"])
