"""The commands that the application adds to `plm-cli`: serve, worker, demo, local-env."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from plm_backend.database import local_addresses, open_database
from plm_backend.demo.command import demo
from plm_backend.errors import SetupError
from plm_backend.logs import configure_logging
from plm_backend.serving import make_app
from plm_backend.settings import Settings
from plm_backend.startup import SECRET, load_settings, setup_errors
from plm_backend.wiring import open_platform, run_worker


def register(app: typer.Typer) -> None:
    """Add the commands to `plm-cli`."""
    app.command("serve")(serve)
    app.command("worker")(worker)
    app.command("local-env")(local_env)
    app.command("demo")(demo)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write the URL to this file once requests are served.")
    ] = None,
) -> None:
    """Serve the API, with a run worker in the same process."""
    with setup_errors():
        settings = load_settings()
        configure_logging(settings)
        listener = _listen(host or settings.host, settings.port if port is None else port)
        url = _url(listener)

        def on_ready() -> None:
            if ready_file is not None:
                draft = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
                draft.write_text(json.dumps({"url": url}), encoding="utf-8")
                draft.rename(ready_file)
            typer.echo(f"listening on {url}", err=True)

        failed: list[Exception] = []
        config = uvicorn.Config(
            make_app(settings, on_ready=on_ready, on_failure=failed.append),
            lifespan="on",
            log_config=None,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run(sockets=[listener])
        if failed:
            raise failed[0]


def worker() -> None:
    """Run a run worker on this node, until it is stopped."""

    async def work(settings: Settings) -> None:
        with open_database(settings) as database:
            async with open_platform(settings, database.app) as platform, run_worker(platform):
                typer.echo("working", err=True)
                await _until_stopped()

    with setup_errors():
        settings = load_settings()
        configure_logging(settings)
        asyncio.run(work(settings))


def local_env() -> None:
    """Print the settings of this local installation for a shell: eval "$(plm-cli local-env)"."""
    with setup_errors():
        settings = load_settings()
        values = {SECRET: os.environ[SECRET], **local_addresses(settings)}
        for name, value in values.items():
            typer.echo(f"export {name}={shlex.quote(value)}")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise SetupError(f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port") from error
    listener.listen(256)
    return listener


async def _until_stopped() -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
