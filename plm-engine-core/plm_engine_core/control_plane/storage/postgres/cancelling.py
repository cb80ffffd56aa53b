"""Cancels what a connection is at, by a request that goes beside it and may come late."""

from __future__ import annotations

import asyncio
import logging

import psycopg

from plm_engine_core.control_plane.storage.postgres.gateway import Session

logger = logging.getLogger(__name__)


class Cancelling:
    """The requests to cancel that were made for one connection. Belongs to one event loop.

    One that comes late meets whatever the connection is at then; one that is lost, of which nothing was heard in time,
    may come at any moment.
    """

    def __init__(self, connection: Session, *, timeout: float) -> None:
        self.is_lost = False
        self._connection = connection
        self._timeout = timeout
        self._request: asyncio.Task[None] | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a request may not have come yet, though one is still waited for."""
        return self._request is not None and not self._request.done()

    def begin(self) -> None:
        """Make a request, unless one is under way."""
        if not self.is_under_way:
            self._request = asyncio.get_running_loop().create_task(self._cancel())

    async def end(self) -> None:
        """Wait until none can reach the connection any more, which is closed where that cannot be known."""
        if self._request is not None:
            await self._request
        if self.is_lost:
            self._connection.pgconn.finish()

    async def _cancel(self) -> None:
        try:
            await self._connection.cancel_safe(timeout=self._timeout)
        except psycopg.Error:
            logger.warning("a booking could not be cancelled", exc_info=True)
            self.is_lost = True
