"""``plm-cli``: the platform from a terminal.

Our own groups of commands stand in `GROUPS`. Other packages add theirs by an entry point of the group
``plm_cli.commands``: a ``typer.Typer``, which becomes a group under the entry point's name, or a callable that is given
the application and adds what it likes.

Every command answers with ``--json`` when asked, prints errors as one sentence on stderr, and ends with a code of
`plm_engine_core.cli.exits.ExitCode`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import typer

from plm_engine_core.cli import approvals, auth, budget, db, doctor, events, halt, policy, registers, run
from plm_engine_core.cli.why import why_command

__all__ = ["COMMANDS_GROUP", "GROUPS", "build_app", "main"]

COMMANDS_GROUP = "plm_cli.commands"

GROUPS: dict[str, typer.Typer] = {
    "agents": registers.agents_app,
    "approvals": approvals.app,
    "auth": auth.app,
    "budget": budget.app,
    "capabilities": registers.capabilities_app,
    "db": db.app,
    "doctor": doctor.app,
    "events": events.app,
    "halt": halt.app,
    "policy": policy.app,
    "run": run.app,
}


def build_app() -> typer.Typer:
    """The application with our groups and those of every installed package."""
    app = typer.Typer(
        name="plm-cli",
        help="Govern what agents do.",
        no_args_is_help=True,
        add_completion=False,
        # A traceback with local variables would print secrets.
        pretty_exceptions_enable=False,
    )
    app.command("why")(why_command)
    for name, group in GROUPS.items():
        app.add_typer(group, name=name)
    for entry in sorted(entry_points(group=COMMANDS_GROUP), key=lambda found: found.name):
        _add(app, entry)
    return app


def main() -> None:
    """Run ``plm-cli`` with the arguments of the process."""
    build_app()(prog_name="plm-cli")


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    """Add another package's commands; one that cannot be loaded is named and must not take the others away."""
    try:
        commands = entry.load()
        if isinstance(commands, typer.Typer):
            app.add_typer(commands, name=entry.name)
        else:
            commands(app)
    except Exception as error:  # noqa: BLE001 - foreign code; `plm-cli db upgrade` may be what repairs it
        typer.echo(f"plm-cli: the commands of {entry.value} are missing: {type(error).__name__}: {error}", err=True)
