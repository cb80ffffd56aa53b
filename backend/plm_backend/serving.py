"""The application as a server runs it: everything is opened when it starts and closed when it stops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from plm_backend.app import create_app
from plm_backend.database import open_database
from plm_backend.settings import Settings
from plm_backend.wiring import open_platform, run_worker


def make_app(
    settings: Settings,
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] = lambda _: None,
) -> Starlette:
    """An ASGI application with API and run worker in one process.

    `on_ready` is called when both are up, `on_failure` with what kept them from starting, before the server gives up.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        started = False
        try:
            with open_database(settings) as database:
                async with open_platform(settings, database.app) as platform, run_worker(platform):
                    app.state.api = create_app(platform)
                    started = True
                    on_ready()
                    yield
        except Exception as error:
            if not started:
                on_failure(error)
            raise

    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        await app.state.api(scope, receive, send)

    app = Starlette(lifespan=lifespan, routes=[Mount("/", app=forward)])
    return app
