"""What commands print: text for people, or with ``--json`` one object for programs, always on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def one_line(text: str) -> str:
    """The text without a line break or anything that moves the cursor or turns writing round: those appear escaped.

    What agents and people wrote is shown in it, so that none of them speaks in the terminal's name.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def lines(text: str) -> str:
    """The same for a text of several lines, which stay, as do tabs in them."""
    return "\n".join("\t".join(map(one_line, line.split("\t"))) for line in text.split("\n"))


def show_refusal(refused: str, reason: object, message: str, *, as_json: bool, **more: Any) -> None:
    """Tell programs what a command was refused, in the API's words; people are told on stderr."""
    if as_json:
        show({"refused": refused, "reason": str(reason), "message": message, **more}, "", as_json=True)


def show(answer: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the answer in the form asked for; values that JSON does not know, such as UUIDs, appear as text."""
    typer.echo(json.dumps(answer, indent=2, default=str) if as_json else lines(text))
