"""Chooses the connection for each booking: all over one while it serves them soon, others only as they are needed.

A connection is a server process. With more of them than processors each finds its caches emptied by the others, and
bookings of one tenant wait for each other's rows anyway. Under constant load a connection would never be idle: it is
given back when somebody waits for one, and whoever waits longest has the next.
"""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakKeyDictionary

from psycopg.errors import InvalidSqlStatementName, LockNotAvailable
from pydantic_core import from_json

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

    async def make(self, document: str) -> Any:
        """Make one booking in a transaction of its own; the JSON that it answers, when what it wrote is on disk.

        Raises:
            psycopg.Error: it failed, so nothing was written; or the connection was lost, and that is not known.
            TimeoutError: the server answers nothing, and it is not known.
            PoolTimeout, PoolClosed: no connection became free.
            UnicodeEncodeError: a text cannot be stored.
        """
        booking = document.encode()
        alone = patiently = False
        tries_left = _TRIES
        while True:
            lane = await (self._open(exclusive=True) if patiently else self._accepting())
            try:
                text = await lane.send(booking, alone=alone)
                answer = from_json(text) if text else None
                if alone or not isinstance(answer, str):
                    return answer
                # It failed in a round and left nothing: by itself it says why.
                alone, patiently = True, answer == LockNotAvailable.sqlstate
            except LockNotAvailable:
                if patiently:
                    raise
                patiently = True
            except NOTHING_RAN as error:
                tries_left -= 1
                if not tries_left:
                    raise
                if isinstance(error, InvalidSqlStatementName):  # the driver drops what is prepared after a rollback
                    lane.forget()

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
        returning = asyncio.get_running_loop().create_task(self._gateway.give_back(lane.connection))
        self._returning.add(returning)
        returning.add_done_callback(self._returning.discard)
