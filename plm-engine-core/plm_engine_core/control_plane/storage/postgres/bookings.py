"""Chooses the connection for each booking: all over one while it serves them soon, others only as they are needed.

A connection is a server process. With more of them than processors each finds its caches emptied by the others, and
bookings of one tenant wait for each other's rows anyway. Under constant load a connection would never be idle: it is
given back when somebody waits for one, and whoever waits longest has the next.
"""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakKeyDictionary

from plm_shared.sqlalchemy_kernel_emitter import Statement
from psycopg.errors import InvalidSqlStatementName, QueryCanceled
from pydantic_core import from_json

from plm_engine_core.control_plane.storage.postgres.calls import call_of
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session
from plm_engine_core.control_plane.storage.postgres.group_commit import NOTHING_RAN, Lane

_TRIES = 5


class Bookings:
    """Makes bookings over connections of a pool, borrowed while there are any. Belongs to one event loop."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._prepared: WeakKeyDictionary[Session, set[bytes]] = WeakKeyDictionary()
        self._lanes: list[Lane] = []
        self._opening: asyncio.Future[None] | None = None
        self._returning: set[asyncio.Task[None]] = set()

    async def make(self, statement: Statement) -> Any:
        """Run a statement in a transaction of its own; the JSON that it answers, when what it wrote is on disk.

        Raises:
            psycopg.Error: it failed, so nothing was written; or the connection was lost, and that is not known.
            TimeoutError: the server answers nothing, and it is not known.
            PoolTimeout, PoolClosed: no connection became free.
        """
        call = call_of(statement)
        held_others_up = False
        for tries_left in reversed(range(_TRIES)):
            lane = await (self._open(exclusive=True) if held_others_up else self._accepting())
            try:
                answer = (await lane.send(call)).get_value(0, 0)
                break
            except NOTHING_RAN as error:
                if not tries_left or (held_others_up and isinstance(error, QueryCanceled)):
                    raise
                held_others_up = held_others_up or isinstance(error, QueryCanceled)
                if isinstance(error, InvalidSqlStatementName):  # the driver drops what is prepared after a rollback
                    lane.forget()
        return from_json(answer) if answer is not None else None

    async def _accepting(self) -> Lane:
        while True:
            for lane in self._lanes:
                if lane.accepts:
                    return lane
            if self._opening is None:
                return await self._open_for_all()
            await asyncio.shield(self._opening)

    async def _open_for_all(self) -> Lane:
        """Open one lane while others wait for it, who fail as this does."""
        self._opening = opening = asyncio.get_running_loop().create_future()
        try:
            return await self._open()
        except Exception as error:
            opening.set_exception(error)
            opening.exception()  # there may be nobody who waits
            raise
        finally:
            self._opening = None
            if not opening.done():
                opening.set_result(None)

    async def _open(self, *, exclusive: bool = False) -> Lane:
        connection = await self._gateway.borrow()
        prepared = self._prepared.setdefault(connection, set())
        lane = Lane(connection, prepared, on_end=self._on_end, wanted=self._gateway.wanted, exclusive=exclusive)
        self._lanes.append(lane)
        return lane

    def _on_end(self, lane: Lane) -> None:
        self._lanes.remove(lane)
        returning = asyncio.get_running_loop().create_task(self._give_back(lane))
        self._returning.add(returning)
        returning.add_done_callback(self._returning.discard)

    async def _give_back(self, lane: Lane) -> None:
        try:
            await lane.cancelling.end()
        finally:
            await self._gateway.give_back(lane.connection)
