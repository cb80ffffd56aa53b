"""What commands print: text for people, or with ``--json`` one object for programs, always on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def show(answer: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the answer in the form asked for; values that JSON does not know, such as UUIDs, appear as text."""
    typer.echo(json.dumps(answer, indent=2, default=str) if as_json else text)
