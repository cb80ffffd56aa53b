"""The commands that the application adds to `plm-cli`: serve, worker, demo, local-env."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shlex
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from plm_backend.database import local_addresses, open_database
from plm_backend.demo.command import demo
from plm_backend.errors import SetupError
from plm_backend.logs import configure_logging
from plm_backend.startup import OLDER_SECRET, SECRET, load_settings, setup_errors
from plm_backend.state import events_key
from plm_backend.stopping import ReloadRequest, StopRequest

_PORT = 8000


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
    """Serve the API, with a run worker in the same process.

    Without --port and PLM_PORT it listens on 8000, or on a free port when that is in use. An embedded database that
    dies is started again; while any other is away, requests are answered with 503.

    SIGHUP has the capability file and the plans read anew; with an error in them what was in force stays.

    Status 0: it was stopped by SIGINT or SIGTERM; 3: a setting is missing or refused, and the sentence says which; 130:
    it was stopped before it was ready.
    """
    stop = StopRequest()
    reload = ReloadRequest(stop)
    with setup_errors():
        stop.listen()
        reload.listen()
        settings = load_settings()
        configure_logging(settings)
        listener = _listen(host or settings.host, settings.port if port is None else port)

        def announce() -> None:
            url = _url(listener)
            if ready_file is not None:
                draft = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
                draft.write_text(json.dumps({"url": url}), encoding="utf-8")
                draft.rename(ready_file)
            typer.echo(f"listening on {url}", err=True)

        with listener, open_database(settings) as database:
            from plm_backend.serving import serve_until_stopped  # takes a second, which a refusal need not wait for

            asyncio.run(serve_until_stopped(settings, database, listener, stop, reload, on_ready=announce))


def worker() -> None:
    """Run a run worker on this node, until it is stopped.

    SIGHUP has the capability file and the plans read anew; with an error in them what was in force stays.

    Status as for `serve`, and 1: the database was away for longer than PLM_DATABASE_PATIENCE_SECONDS.
    """
    stop = StopRequest()
    reload = ReloadRequest(stop)
    with setup_errors():
        stop.listen()
        reload.listen()
        settings = load_settings()
        configure_logging(settings)
        with open_database(settings) as database:
            from plm_backend.serving import work_until_stopped

            def announce() -> None:
                typer.echo("working", err=True)

            asyncio.run(work_until_stopped(settings, database, stop, reload, on_ready=announce))


def local_env() -> None:
    """Print the settings of this local installation for a shell: eval "$(plm-cli local-env)"."""
    with setup_errors():
        settings = load_settings()
        secret = os.environ.get(SECRET) or os.environ[OLDER_SECRET]
        values = {SECRET: secret, **local_addresses(settings)}
        if (key := events_key(settings)) is not None:
            values["PLM_EVENTS_KEY"] = str(key)
        for name, value in values.items():
            typer.echo(f"export {name}={shlex.quote(value)}")


def _listen(host: str, port: int | None) -> socket.socket:
    """Listen on the port that is asked for; when none is, on 8000 or any that is free."""
    try:
        try:
            return _bound(host, _PORT if port is None else port)
        except OSError as error:
            if port is not None or error.errno != errno.EADDRINUSE:
                raise
            return _bound(host, 0)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        place = f"{host}:{_PORT if port is None else port}"
        raise SetupError(f"cannot listen on {place} ({reason}); choose another with --host and --port") from error


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
        stack.pop_all()
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
