"""The application as servers run it: everything is opened when it starts and closed when it stops."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from plm_backend.app import create_app
from plm_backend.database import open_database
from plm_backend.errors import SetupError
from plm_backend.settings import Settings
from plm_backend.wiring import open_platform, run_worker

_GRACE_SECONDS = 5  # for answers under way; event streams are ended at once


@asynccontextmanager
async def open_application(settings: Settings) -> AsyncIterator[FastAPI]:
    """The API with a run worker in the same process.

    Raises:
        SetupError: the operator must change something first.
    """
    with open_database(settings) as database:
        async with open_platform(settings, database.app) as platform, run_worker(platform):
            yield create_app(platform)


async def serve_until_stopped(settings: Settings, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Serve on `listener` until SIGINT or SIGTERM; `on_ready` is called when requests are answered."""
    stopped = _stop_requested()
    async with open_application(settings) as app:
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=_GRACE_SECONDS)
        server = _Server(config, on_ready)
        stopper = asyncio.create_task(_stop(server, stopped))
        try:
            await server.serve(sockets=[listener])
        finally:
            stopper.cancel()


async def work_until_stopped(settings: Settings, *, on_ready: Callable[[], None]) -> None:
    """Drive runs until SIGINT or SIGTERM, without an API.

    Raises:
        SetupError: the operator must change something first.
    """
    if settings.run_concurrency == 0:
        raise SetupError("PLM_RUN_CONCURRENCY is 0, so this run worker would drive nothing; set it to 1 or more")
    stopped = _stop_requested()
    with open_database(settings) as database:
        async with open_platform(settings, database.app) as platform, run_worker(platform):
            on_ready()
            await stopped.wait()


def _stop_requested() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set; from here on they do nothing else."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def make_app(settings: Settings) -> Starlette:
    """An ASGI application for a server of the operator's choice, which runs its lifespan."""

    @asynccontextmanager
    async def lifespan(outer: Starlette) -> AsyncIterator[None]:
        async with open_application(settings) as app:
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


async def _stop(server: uvicorn.Server, stopped: asyncio.Event) -> None:
    await stopped.wait()
    server.handle_exit(signal.SIGTERM, None)
