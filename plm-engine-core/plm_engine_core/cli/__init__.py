"""``plm-cli``: the platform from a terminal.

Our own commands stand in `COMMANDS`. Other packages add theirs by an entry point of the group ``plm_cli.commands``: a
``typer.Typer``, which becomes a group under the entry point's name, or a callable that is given the application and
adds what it likes. A command waits for no other's imports: only what it is called by is loaded.

Every command answers with ``--json`` when asked, prints errors as one sentence on stderr, and ends with a code of
`plm_engine_core.cli.exits.ExitCode`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

import typer

__all__ = ["COMMANDS", "COMMANDS_GROUP", "build_app", "main"]

COMMANDS_GROUP = "plm_cli.commands"

COMMANDS = {
    "agents": "registers:agents_app",
    "approvals": "approvals:app",
    "auth": "auth:app",
    "budget": "budget:app",
    "capabilities": "registers:capabilities_app",
    "db": "db:app",
    "doctor": "doctor:app",
    "events": "events:app",
    "halt": "halt:app",
    "policy": "policy:app",
    "run": "run:app",
    "why": "why:why_command",
}
"""Where each of our commands and groups of commands lies: its module in this package, and its name there."""


def build_app(word: str = "") -> typer.Typer:
    """The application with our commands and those of every installed package.

    With ``word``, the first argument of the command line, what this word cannot mean may be missing.
    """
    app = typer.Typer(
        name="plm-cli",
        help="Govern what agents do.",
        no_args_is_help=True,
        add_completion=False,
        # A traceback with local variables would print secrets.
        pretty_exceptions_enable=False,
    )
    app.callback()(_nothing_before_a_command)
    if word not in COMMANDS:
        for entry in sorted(entry_points(group=COMMANDS_GROUP), key=lambda found: found.name):
            _add(app, entry)
    if word not in _names(app):
        for name in [word] if word in COMMANDS else COMMANDS:
            _add_own(app, name)
    return app


def main() -> None:
    """Run ``plm-cli`` with the arguments of the process."""
    build_app(sys.argv[1] if len(sys.argv) > 1 else "")(prog_name="plm-cli")


def _nothing_before_a_command() -> None:
    """Keeps an application of one command one that has to be told which."""


def _names(app: typer.Typer) -> set[str | None]:
    return {each.name for each in app.registered_commands} | {str(each.name) for each in app.registered_groups}


def _add_own(app: typer.Typer, name: str) -> None:
    module, _, attribute = COMMANDS[name].partition(":")
    commands = getattr(import_module(f"{__name__}.{module}"), attribute)
    if isinstance(commands, typer.Typer):
        app.add_typer(commands, name=name)
    else:
        app.command(name)(commands)


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
