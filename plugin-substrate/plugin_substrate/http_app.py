"""One plugin behind HTTP, to try it with curl: the endpoints of the published system over a worker of a real manager.

For a developer's own machine alone: whoever reaches the port can call the plugin. Requests under another name than this
machine's own, and those of web pages, are refused. Needs ``plugin-substrate[http]``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Body, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.middleware.trustedhost import TrustedHostMiddleware

from plugin_substrate.errors import JobError, PluginCancelledError, PluginError, PluginInputError
from plugin_substrate.instance import CancelOutcome
from plugin_substrate.interface import CallContext
from plugin_substrate.manager import PluginManager
from plugin_substrate.stores.job_rows import as_json
from plugin_substrate.testing.describe import plugin_meta

_HERE = ["127.0.0.1", "localhost", "[::1]"]


class Arguments(BaseModel):
    """What a call of ``execute`` or ``execute_stream`` is given."""

    model_config = ConfigDict(extra="forbid")

    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class Reconfiguration(BaseModel):
    """A configuration in the place of another; the old one is known already, and taken for the sake of old clients."""

    old_config: dict[str, Any] = {}
    new_config: dict[str, Any]


@dataclass(kw_only=True)
class _Desk:
    """The loaded plugin, and what is told of its calls."""

    manager: PluginManager
    name: str
    running: set[str] = field(default_factory=set)
    progress: float = 0.0
    message: str = ""

    def begin(self) -> CallContext:
        call = CallContext(call_id=secrets.token_hex(16))
        self.running.add(call.call_id)
        self.hear(0.0, "")
        return call

    def hear(self, progress: float, message: str) -> None:
        self.progress, self.message = progress, message


def create_app(
    module: str,
    class_name: str,
    *,
    config: Mapping[str, Any] | None = None,
    place: Path | None = None,
    **description: Any,
) -> FastAPI:
    """Return an app that loads a plugin of this process's environment when it starts, and unloads it at its end.

    This process imports nothing of it. ``place`` is the folder of a module that is not on its path; ``description`` are
    keys of the plugin's metadata, such as ``isolation``, which is granted. Start one worker of a server, on loopback:
    ``uvicorn --factory my_module:app``.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="plugin-http-") as folder:
            async with PluginManager(data_dir=Path(folder)) as manager:
                environments = Path(folder) / "environments"
                meta = await asyncio.to_thread(
                    plugin_meta, f"{module}:{class_name}", environments=environments, place=place, **description
                )
                await manager.load_plugin_async(meta, config)
                app.state.desk = _Desk(manager=manager, name=meta.name)
                yield

    app = FastAPI(title=f"{module}:{class_name}", lifespan=lifespan, dependencies=[Depends(_from_here)])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_HERE)
    app.add_exception_handler(PluginError, _on_plugin_error)
    _add_calls(app)
    _add_questions(app)
    _add_changes(app)
    return app


def _desk(request: Request) -> _Desk:
    desk: _Desk = request.app.state.desk
    return desk


async def _on_plugin_error(_: Request, error: Exception) -> Response:
    status = 409 if isinstance(error, PluginCancelledError) else 500
    return _shown({"detail": str(error), "error": JobError.from_exception(error)}, status)


def _shown(value: Any, status: int = 200) -> Response:
    return Response(_json(value), status, media_type="application/json")


def _json(value: Any) -> str:
    return json.dumps(value, default=_in_json)


def _in_json(value: Any) -> Any:
    """Return what JSON has not: bytes in base64, objects with their fields, and all else as text."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    try:
        return as_json(value)
    except TypeError:
        return str(value)


def _from_here(request: Request) -> None:
    """Refuse what a page of another origin has had a browser send."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, f"requests of pages from {origin:.80} are refused")


def _add_calls(app: FastAPI) -> None:
    @app.post("/execute")
    async def execute(request: Request, arguments: Arguments) -> Response:
        desk = _desk(request)
        call = desk.begin()
        try:
            work = desk.manager.execute_plugin_async(
                desk.name, *arguments.args, call=call, on_progress=desk.hear, **arguments.kwargs
            )
            return _shown(await work)
        finally:
            desk.running.discard(call.call_id)

    @app.post("/execute_stream")
    async def execute_stream(request: Request, arguments: Arguments) -> Response:
        return StreamingResponse(_lines(_desk(request), arguments), media_type="application/x-ndjson")

    @app.post("/cancel")
    async def cancel(request: Request) -> dict[str, str]:
        desk = _desk(request)
        cancels = (desk.manager.cancel_call(desk.name, call_id) for call_id in list(desk.running))
        outcomes = set(await asyncio.gather(*cancels)) - {CancelOutcome.NOT_RUNNING}
        return {"status": "cancelled" if outcomes else "not_running"}


async def _lines(desk: _Desk, arguments: Arguments) -> AsyncIterator[str]:
    """Yield a line of JSON for each chunk; an error is the last line."""
    call = desk.begin()
    chunks = desk.manager.execute_plugin_stream(
        desk.name, *arguments.args, call=call, on_progress=desk.hear, **arguments.kwargs
    )
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _json(chunk) + "\n"
    except PluginError as error:
        yield _json({"_job_error": JobError.from_exception(error)}) + "\n"
    finally:
        desk.running.discard(call.call_id)


def _add_questions(app: FastAPI) -> None:
    @app.get("/health")
    async def health(request: Request) -> dict[str, Any]:
        desk = _desk(request)
        instance = desk.manager.get_instance(desk.name)
        return {
            "status": "running" if instance.alive else "stopped",
            "pid": instance.pid,
            "name": instance.plugin_name,
            "version": instance.plugin_version,
            "layers": instance.layers,
        }

    @app.get("/stats")
    async def stats(request: Request) -> Response:
        desk = _desk(request)
        return _shown(await desk.manager.get_plugin_stats_async(desk.name))

    @app.get("/config_schema")
    async def config_schema(request: Request) -> Response:
        desk = _desk(request)
        meta = desk.manager.get_plugin_meta(desk.name)
        return _shown((meta.live_config_schema or meta.config_schema or {}) if meta else {})

    @app.get("/config")
    async def current_config(request: Request) -> Response:
        desk = _desk(request)
        return _shown(desk.manager.get_plugin_config(desk.name))

    @app.get("/config_options")
    async def config_options(request: Request) -> Response:
        desk = _desk(request)
        return _shown(await desk.manager.get_config_options_async(desk.name))

    @app.get("/progress")
    async def progress(request: Request) -> dict[str, Any]:
        desk = _desk(request)
        return {"progress": desk.progress, "message": desk.message}

    for path, verb in (
        ("/get_system_status", PluginManager.get_system_status_async),
        ("/list_processes", PluginManager.list_processes_async),
    ):
        app.post(path)(_of_a_monitor(verb))


def _of_a_monitor(verb: Callable[[PluginManager, str], Awaitable[Any]]) -> Callable[..., Awaitable[Response]]:
    async def ask(request: Request) -> Response:
        desk = _desk(request)
        try:
            return _shown(await verb(desk.manager, desk.name))
        except PluginInputError as error:
            raise HTTPException(404, str(error)) from error

    return ask


def _add_changes(app: FastAPI) -> None:
    @app.post("/initialize")
    async def initialize(request: Request, config: dict[str, Any] = Body()) -> Response:  # noqa: B008 - how it is said
        desk = _desk(request)
        try:
            await desk.manager.reload_plugin_async(desk.name, config)
        except PluginError as error:
            return JSONResponse({"detail": str(error)}, 400)
        return _shown({"status": "ok"})

    @app.post("/reconfigure")
    async def reconfigure(request: Request, change: Reconfiguration) -> dict[str, str]:
        desk = _desk(request)
        await desk.manager.reconfigure_async(desk.name, change.new_config)
        return {"status": "reconfigured"}

    @app.post("/prefetch")
    async def prefetch(request: Request) -> dict[str, str]:
        desk = _desk(request)
        await desk.manager.prefetch_async(desk.name, on_progress=desk.hear)
        return {"status": "prefetched"}

    @app.post("/on_disable")
    async def on_disable(request: Request) -> dict[str, str]:
        desk = _desk(request)
        await desk.manager.disable_plugin_async(desk.name)
        return {"status": "disabled"}

    @app.post("/on_enable")
    async def on_enable(request: Request) -> dict[str, str]:
        desk = _desk(request)
        await desk.manager.enable_plugin_async(desk.name)
        return {"status": "enabled"}

    @app.post("/cleanup")
    async def cleanup(request: Request) -> dict[str, str]:
        desk = _desk(request)
        await desk.manager.unload_plugin_async(desk.name)
        return {"status": "cleaned"}
