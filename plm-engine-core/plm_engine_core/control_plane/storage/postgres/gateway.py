"""Connections bound to one tenant, and the database's errors in the control plane's own words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
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

_BUSY = {"55P03", "57014", "40P01", "40001", "53300", "53100", "53200"}
_dumps = partial(json.dumps, allow_nan=False, ensure_ascii=False)


def jsonb(value: Any) -> Jsonb:
    """A JSON parameter; NaN and infinities are refused before they reach the database."""
    return Jsonb(value, dumps=_dumps)


def _translate(error: psycopg.Error) -> ControlPlaneError | None:
    text = error.diag.message_primary or str(error)
    match error.sqlstate:
        case "PLF01":
            return FencingLost(text)
        case "PLC01":
            return IdempotencyConflict(text)
        case "PLN01":
            missing = NotFound("object", "")
            missing.args = (text,)
            return missing
        case "PLS01":
            return Conflict(text, reason="state")
        case "PLI01" | "PLT01":
            return InvalidRequest(text, field="connection")
        case "23503" if "tenant" in (error.diag.constraint_name or ""):
            return NotFound("tenant", "of this request")
        case state if state in _BUSY or isinstance(error, psycopg.OperationalError):
            return StorageUnavailable(f"the database did not answer in time or is not reachable: {text}")
        case _:
            return None


@contextmanager
def translated() -> Iterator[None]:
    """Raise the control plane's errors in place of the driver's; what has none is a defect and passes."""
    try:
        yield
    except psycopg.Error as error:
        known = _translate(error)
        if known is None:
            raise
        raise known from error
    except (PoolTimeout, PoolClosed) as error:
        raise StorageUnavailable("no database connection became free in time") from error


class Gateway:
    """Hands out pooled connections; every transaction is bound to one tenant before its first statement."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Session]:
        """One pooled connection in autocommit mode."""
        with translated():
            async with self._pool.connection() as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self, tenant_id: UUID) -> AsyncIterator[Session]:
        """A transaction bound to `tenant_id`: committed on a clean exit, rolled back on any exception."""
        async with self.connection() as connection, connection.transaction():
            await connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(tenant_id)])
            yield connection

    async def append(
        self, connection: Session, tenant_id: UUID, stream: str, kind: str, actor: str, payload: dict[str, Any]
    ) -> None:
        """Append one event, as the last write of the transaction."""
        await connection.execute(
            "SELECT engine_append_event_v1(%s, %s, %s, %s, %s)", [tenant_id, stream, kind, actor, jsonb(payload)]
        )
