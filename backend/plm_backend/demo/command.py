"""The command `plm-cli demo`."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from plm_backend.errors import BackendError, SetupError
from plm_backend.startup import load_settings, setup_errors

DEMO_FAILED = 1


def demo(
    bill: Annotated[
        str | None,
        typer.Option(
            "--input",
            envvar="INPUT",
            help="A bill of materials (CycloneDX JSON or CSV), or 'env' for this environment.",
        ),
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Ask you before the write.")] = False,
    deny: Annotated[bool, typer.Option("--deny", help="Deny the write, to see the other path.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Review a bill of materials under control: plan, plugins, approval, report, record."""
    if interactive and deny:
        raise typer.BadParameter("--interactive and --deny exclude each other")
    import httpx

    from plm_backend.demo.course import perform
    from plm_backend.demo.display import Display

    display = Display(quiet=as_json)
    with setup_errors():
        settings = load_settings()
        started = time.perf_counter()
        try:
            report = perform(settings, display, bill, interactive=interactive, deny=deny)
        except (BackendError, httpx.HTTPError) as error:
            if isinstance(error, SetupError):
                raise
            typer.echo(f"plm-cli: {error}", err=True)
            raise typer.Exit(DEMO_FAILED) from error
        report["seconds"] = round(time.perf_counter() - started, 2)
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        display.say(f"\nthe demo took {report['seconds']:.1f} s")
        if not report["succeeded"]:
            raise typer.Exit(DEMO_FAILED)
