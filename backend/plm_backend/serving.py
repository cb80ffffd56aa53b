"""The application as servers run it: everything is opened when it starts and closed when it stops."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from plm_backend.app import create_app
from plm_backend.database import Database, open_database
from plm_backend.errors import DatabaseLost, SetupError
from plm_backend.reloading import Reloading
from plm_backend.server_keeper import keep_running
from plm_backend.settings import Settings
from plm_backend.stopping import ReloadRequest, StopRequest
from plm_backend.wiring import Platform, background, open_platform, run_worker

_GRACE_SECONDS = 5  # for answers under way; event streams are ended at once
_LONGEST_HEAD = 64 * 1024  # bytes of a request's line and headers that may wait for their end


@asynccontextmanager
async def open_application(
    settings: Settings, database: Database, *, reload: ReloadRequest | None = None
) -> AsyncIterator[FastAPI]:
    """The API with a run worker in the same process; on `reload` it reads its files anew.

    Raises:
        SetupError: the operator must change something first.
    """
    async with _open_node(settings, database, reload) as platform:
        yield create_app(platform)


async def serve_until_stopped(
    settings: Settings,
    database: Database,
    listener: socket.socket,
    stop: StopRequest,
    reload: ReloadRequest,
    *,
    on_ready: Callable[[], None],
) -> None:
    """Serve on `listener` until it is asked to stop; `on_ready` is called when requests are answered."""
    stopped = asyncio.create_task(stop.wait())
    async with open_application(settings, database, reload=reload) as app:
        config = uvicorn.Config(
            app,
            http="h11",  # named, or another package's dependency would decide; and it ends a head that has no end
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            h11_max_incomplete_event_size=_LONGEST_HEAD,
        )
        server = _Server(config, on_ready)
        stopped.add_done_callback(lambda _: server.handle_exit(signal.SIGTERM, None))
        await server.serve(sockets=[listener])
    stopped.cancel()


async def work_until_stopped(
    settings: Settings,
    database: Database,
    stop: StopRequest,
    reload: ReloadRequest,
    *,
    on_ready: Callable[[], None],
) -> None:
    """Drive runs until it is asked to stop, without an API.

    Raises:
        SetupError: the operator must change something first.
        DatabaseLost: the database was away for longer than `database_patience_seconds`.
    """
    if settings.run_concurrency == 0:
        raise SetupError("PLM_RUN_CONCURRENCY is 0, so this run worker would drive nothing; set it to 1 or more")
    stopped = asyncio.create_task(stop.wait())
    async with _open_node(settings, database, reload) as platform:
        on_ready()
        patience = settings.database_patience_seconds
        given_up = asyncio.create_task(platform.database.given_up(patience))
        await asyncio.wait([stopped, given_up], return_when=asyncio.FIRST_COMPLETED)
        given_up.cancel()
    if not stopped.done():
        stopped.cancel()
        raise DatabaseLost(f"the database was away for {patience:g} s; start the run worker again once it is back")


@asynccontextmanager
async def _open_node(settings: Settings, database: Database, reload: ReloadRequest | None) -> AsyncIterator[Platform]:
    """What an API process and a run worker have in common; an embedded server is kept alive meanwhile."""
    async with AsyncExitStack() as stack:
        if database.server is not None:
            await stack.enter_async_context(background(partial(keep_running, database.server), "server keeper"))
        platform = await stack.enter_async_context(open_platform(settings, database.app))
        manager = await stack.enter_async_context(run_worker(platform))
        if reload is not None:
            reloading = partial(Reloading(platform, manager).on, reload)
            await stack.enter_async_context(background(reloading, "reload"))
        yield platform


def make_app(settings: Settings) -> Starlette:
    """An ASGI application for a server of the operator's choice, which runs its lifespan."""

    @asynccontextmanager
    async def lifespan(outer: Starlette) -> AsyncIterator[None]:
        with open_database(settings) as database:
            async with open_application(settings, database) as app:
                outer.state.api = app
                yield

    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        await outer.state.api(scope, receive, send)

    outer = Starlette(lifespan=lifespan, routes=[Mount("/", app=forward)])
    return outer


class _Server(uvicorn.Server):
    """uvicorn, which tells when it is up, and leaves signals to us: it would end the process before all is closed."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
