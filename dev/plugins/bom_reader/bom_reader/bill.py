"""The one form that every kind of bill is brought into."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

MAX_TEXT = 500


@dataclass(frozen=True, kw_only=True)
class Component:
    """One entry of a bill. ``licenses`` holds what the bill says, word for word; ``line`` is None outside CSV."""

    ref: str
    name: str
    description: str = ""
    version: str = ""
    purl: str = ""
    supplier: str = ""
    quantity: float | None = None
    licenses: tuple[str, ...] = ()
    line: int | None = None


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """Something in the bill that could not be used, where it stands and why.

    ``where`` is a line number (CSV) or a path (CycloneDX). ``kept`` says whether the rest of the row is still among
    the components.
    """

    where: int | str
    reason: str
    kept: bool

    def as_json(self) -> dict[str, Any]:
        """Return the row as it stands in the output."""
        key = "line" if isinstance(self.where, int) else "path"
        return {key: self.where, "reason": self.reason, "kept": self.kept}


@dataclass(kw_only=True)
class Bill:
    """What was read. ``column_mapping`` maps each field to the header it came from, and is None outside CSV."""

    file_name: str
    format: str
    spec_version: str | None = None
    components: list[Component] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    column_mapping: dict[str, str] | None = None
    unmapped_columns: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the bill as the capability's output."""
        return {
            "file_name": self.file_name,
            "format": self.format,
            "spec_version": self.spec_version,
            "component_count": len(self.components),
            "components": [{**asdict(one), "licenses": list(one.licenses)} for one in self.components],
            "column_mapping": self.column_mapping,
            "unmapped_columns": self.unmapped_columns,
            "bad_rows": [row.as_json() for row in self.bad_rows],
        }


def clean(text: object) -> str:
    """Return ``text`` on one line without control or direction characters, which could rewrite a terminal or a page.

    Anything but text is empty; text beyond the limit is a `ValueError`.
    """
    if not isinstance(text, str):
        return ""
    printable = "".join(character if character.isprintable() else " " for character in text)
    shortened = " ".join(printable.split())
    if len(shortened) > MAX_TEXT:
        raise ValueError(f"a text of {len(shortened)} characters; the limit is {MAX_TEXT}")
    return shortened
