"""What this process hears of runs, by NOTIFY; a lost one loses nothing, because readers look at the stream itself."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any
from uuid import UUID

import psycopg
from plm_engine_core.control_plane.storage.postgres.policies import NEWS_CHANNEL
from plm_engine_core.control_plane.storage.postgres.signals import RUN_NEWS
from plm_shared.addresses import driver_dsn
from plm_shared.cancellation import kept_cancel

from plm_backend.reachability import Reachability

logger = logging.getLogger(__name__)

_RECONNECT_SECONDS = 0.5
_LOOK_EVERY_SECONDS = 5.0
_ANSWER_SECONDS = 5


async def _require_answer(connection: psycopg.AsyncConnection[Any], statement: bytes) -> None:
    """A server that is frozen, or behind a network that is silent, closes no connection."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await connection.execute(statement)
    except TimeoutError as error:
        raise psycopg.OperationalError(f"it gave no answer in {_ANSWER_SECONDS} s") from error


class SignalHub:
    """One listening connection per process, fanned out to whoever watches a run here.

    It is also how the process knows, and says, that the database is gone and back again.
    """

    def __init__(self, dsn: str, *, database: Reachability) -> None:
        self._dsn = driver_dsn(dsn)
        self._database = database
        self._watchers: dict[tuple[str, str], set[asyncio.Queue[Mapping[str, Any]]]] = {}
        self._holders: dict[tuple[str, str], set[asyncio.Event]] = {}
        self.policy_news = asyncio.Event()
        """Set when a policy may have been activated; whoever looks clears it."""

    async def listen(self) -> None:
        """Listen until cancelled; after a lost connection every watcher is woken, for it may have missed something."""
        while True:
            try:
                with kept_cancel():
                    await self._listen_while_connected()
            except psycopg.Error as error:
                self._database.lost(error)
                await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen_while_connected(self) -> None:
        async with await psycopg.AsyncConnection.connect(
            self._dsn, autocommit=True, connect_timeout=_ANSWER_SECONDS
        ) as connection:
            await _require_answer(connection, f"LISTEN {RUN_NEWS}; LISTEN {NEWS_CHANNEL}".encode())
            await self._database.found()
            self._wake_all()
            while True:
                async for notice in connection.notifies(timeout=_LOOK_EVERY_SECONDS):
                    if notice.channel == NEWS_CHANNEL:
                        self.policy_news.set()
                    else:
                        self._hand_out(notice.payload)
                await _require_answer(connection, b"SELECT 1")

    @asynccontextmanager
    async def watch(self, tenant_id: UUID, run_id: UUID) -> AsyncIterator[asyncio.Queue[Mapping[str, Any]]]:
        """A queue of news of one run; when its reader is slow, old news is dropped."""
        key = (str(tenant_id), str(run_id))
        queue: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue(maxsize=64)
        self._watchers.setdefault(key, set()).add(queue)
        try:
            yield queue
        finally:
            self._watchers[key].discard(queue)
            if not self._watchers[key]:
                del self._watchers[key]

    @contextmanager
    def interrupts(self, tenant_id: UUID, run_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set on every interrupt that concerns this run."""
        key = (str(tenant_id), str(run_id))
        event = asyncio.Event()
        self._holders.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            self._holders[key].discard(event)
            if not self._holders[key]:
                del self._holders[key]

    def _interrupt(self, tenant: str | None, run: str | None) -> None:
        for (of_tenant, of_run), events in self._holders.items():
            if tenant in (None, of_tenant) and run in (None, of_run):
                for event in events:
                    event.set()

    def _hand_out(self, payload: str) -> None:
        try:
            news = json.loads(payload)
            key = (news["tenant"], news["run"])
        except (ValueError, KeyError, TypeError):
            logger.warning("news that is not ours was ignored")
            return
        if "interrupt" in news:
            self._interrupt(*key)
            return
        for queue in self._watchers.get(key, ()):
            _put(queue, news)

    def _wake_all(self) -> None:
        self._interrupt(None, None)
        self.policy_news.set()
        for queues in self._watchers.values():
            for queue in queues:
                _put(queue, {})


def _put(queue: asyncio.Queue[Mapping[str, Any]], news: Mapping[str, Any]) -> None:
    if queue.full():
        with suppress(asyncio.QueueEmpty):
            queue.get_nowait()
    queue.put_nowait(news)
