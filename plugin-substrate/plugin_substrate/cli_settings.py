"""What the commands of ``cjm-ctl`` share: their options, the settings in force, and how one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from plugin_substrate.configuration import get_config

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where environments and manifests live. Default: $CJM_DATA_DIR, else ~/.cjm."),
]
PluginsFile = Annotated[
    Path | None, typer.Option("--plugins", help="The file that lists the plugins. Default: that of cjm.yaml.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def data_folder(option: Path | None) -> Path:
    """Resolve the data directory: the command's option, then the settings in force."""
    return option or get_config().data_dir


def plugins_file(option: Path | None) -> Path:
    """Resolve the file that lists the plugins: the command's option, then the settings in force."""
    return option or get_config().plugins_config


def fail(reason: object) -> NoReturn:
    """End with status 1 and a reason."""
    typer.echo(str(reason), err=True)
    raise typer.Exit(1)
