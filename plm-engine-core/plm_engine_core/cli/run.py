"""``plm-cli run``: what an operator does to one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, show
from plm_engine_core.cli.storage import Books, as_platform
from plm_engine_core.control_plane.identity import require_identity
from plm_engine_core.control_plane.runs import Run

app = typer.Typer(help="Look after single runs.", no_args_is_help=True)


@app.command("reconcile")
def reconcile(
    run_id: Annotated[UUID, typer.Argument(help="A run in outcome_unknown.")],
    tenant_id: Annotated[UUID, typer.Option(help="Whose run.")],
    happened: Annotated[
        bool | None, typer.Option("--happened/--did-not", help="Whether the effect of its open step took place.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --happened: a JSON file with what the step should have returned.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what became of a step whose outcome is unknown; the run goes on from there.

    With --happened the step counts as done, with --did-not it is attempted again. It is recorded as reported by the
    operator, never as measured. What the call had reserved stays spent either way, as it may have cost that; give it
    back with `plm-cli budget correct`. Status 0: the run goes on; 1: refused; 2: wrong arguments; 3: no address.
    """
    if happened is None:
        fail(ExitCode.USAGE, "say --happened or --did-not; when nobody knows, leave the run as it is")
    if output is not None and not happened:
        fail(ExitCode.USAGE, "--output goes with --happened")
    document = _read(output) if output is not None else None
    run = as_platform(
        lambda books: _reconcile(books, tenant_id, run_id, happened=happened, output=document),
        of=tenant_id,
        as_json=as_json,
    )
    show({"run_id": run.id, "state": run.state.value}, f"run {run.id} is {run.state.value}", as_json=as_json)


async def _reconcile(books: Books, tenant_id: UUID, run_id: UUID, *, happened: bool, output: Any) -> Run:
    actor = f"system:{require_identity().user_id}"  # as the audit record has it, which tells who that is
    return await books.storage.runs.reconcile(tenant_id, run_id, happened=happened, output=output, actor=actor)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fail(ExitCode.USAGE, f"--output {path} cannot be read as JSON: {error}")
