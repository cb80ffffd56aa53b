"""How a command ends: the documented exit codes, and the one way to end with an error."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NoReturn, TypeVar

import typer

from plm_engine_core.cli.output import lines
from plm_engine_core.control_plane.errors import InvalidRequest

Loaded = TypeVar("Loaded")


class ExitCode(IntEnum):
    """What a script may rely on; the numbers never change their meaning."""

    OK = 0
    FAILED = 1  # it was tried and did not work; the sentence on stderr says why
    USAGE = 2  # the arguments are wrong; nothing was tried
    NOT_CONFIGURED = 3  # a setting is missing or refused; nothing was tried
    INTERRUPTED = 130  # by a signal, before it was done


def fail(code: ExitCode, sentence: str) -> NoReturn:
    """End the command: one sentence on stderr, nothing on stdout."""
    typer.echo(f"plm-cli: {lines(sentence)}", err=True)
    raise typer.Exit(int(code))


def loaded(load: Callable[[Path], Loaded], path: Path) -> Loaded:
    """What a file of the operator's holds; one that cannot be read ends the command."""
    try:
        return load(path)
    except InvalidRequest as error:
        fail(ExitCode.NOT_CONFIGURED, str(error))
