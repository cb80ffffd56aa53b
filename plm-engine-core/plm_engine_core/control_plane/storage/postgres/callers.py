"""A connection of the caller's, whose transaction decides what becomes of what is booked in it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from psycopg.errors import InFailedSqlTransaction, ReadOnlySqlTransaction
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.storage.ports import Connection

Parameters = Sequence[Any] | Mapping[str, Any]


async def fetched(connection: Connection, query: bytes, parameters: Parameters) -> Mapping[str, Any] | None:
    """The one row of a query, on whatever connection of psycopg's the caller has; a synchronous one waits in a thread.

    The cursor is of the driver's plain kind, whatever the caller's own cursors and rows are.

    Raises:
        InvalidRequest: it holds no transaction, or one in which nothing can be written.
        psycopg.Error: the query failed.
    """
    try:
        if isinstance(connection, psycopg.Connection):
            return await asyncio.to_thread(_fetched, connection, query, parameters)
        if not isinstance(connection, psycopg.AsyncConnection):
            kind = f"{type(connection).__module__}.{type(connection).__qualname__}"
            raise InvalidRequest(f"the connection has to be one of psycopg's, not a {kind}", field="connection")
        if _unclear(connection):
            async with connection.pipeline() as pipeline:
                await pipeline.sync()
        _require_transaction(connection)
        cursor = psycopg.AsyncCursor(connection, row_factory=dict_row)
        await cursor.execute(query, parameters)
        return await cursor.fetchone()
    except (InFailedSqlTransaction, ReadOnlySqlTransaction) as error:
        raise InvalidRequest(
            f"nothing can be booked in the transaction of the connection: {error.diag.message_primary}",
            field="connection",
        ) from error


def _fetched(connection: psycopg.Connection[Any], query: bytes, parameters: Parameters) -> Mapping[str, Any] | None:
    if _unclear(connection):
        with connection.pipeline() as pipeline:
            pipeline.sync()
    _require_transaction(connection)
    cursor = psycopg.Cursor(connection, row_factory=dict_row)
    return cursor.execute(query, parameters).fetchone()


def _unclear(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether only the answer to what a pipeline has sent tells if there is a transaction."""
    return connection.autocommit and connection.info.transaction_status is TransactionStatus.ACTIVE


def _require_transaction(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Refuse a connection on which each statement would commit by itself."""
    if connection.autocommit and connection.info.transaction_status is TransactionStatus.IDLE:
        raise InvalidRequest(
            "the connection is in autocommit mode and holds no transaction; open one first", field="connection"
        )
