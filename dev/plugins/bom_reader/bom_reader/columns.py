"""Which header names mean which field: the whole table, in one place."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Spellings are compared in lower case with everything but letters and digits removed. The first one that a header row
#: has wins, so the more exact names stand first.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "ref": (
        "part number", "part no", "part #", "p/n", "pn", "mpn", "manufacturer part number", "item number", "item no",
        "sku", "part id", "component id", "article number", "material number", "part", "ref",
    ),
    "name": ("name", "component name", "component", "package", "package name", "module"),
    "description": ("description", "part description", "item description", "designation", "title"),
    "version": ("version", "revision", "rev", "rev.", "part revision", "release", "issue"),
    "purl": ("purl", "package url"),
    "quantity": ("quantity", "qty", "qty.", "quantity per assembly", "qpa", "count", "amount", "pcs", "pieces"),
    "supplier": ("supplier", "supplier name", "vendor", "manufacturer", "mfr", "mfg", "source", "maker"),
    "licenses": (
        "license", "licence", "licenses", "licences", "spdx", "spdx license", "license expression",
        "license/compliance", "licence/compliance", "license or compliance", "compliance",
        "compliance status", "rohs", "rohs status",
    ),
}  # fmt: skip


def squeeze(header: str) -> str:
    """Return a header in the form in which headers are compared."""
    return re.sub(r"[\W_]+", "", header).lower() or header.strip()


_KNOWN = {field: [squeeze(name) for name in names] for field, names in SYNONYMS.items()}


def map_columns(headers: Sequence[str]) -> dict[str, int]:
    """Return which column holds which field. See `usable` for the least a bill must name."""
    squeezed = [squeeze(header) for header in headers]
    mapping = {}
    for field, names in _KNOWN.items():
        position = next((squeezed.index(name) for name in names if name in squeezed), None)
        if position is not None:
            mapping[field] = position
    return mapping


def usable(mapping: dict[str, int]) -> bool:
    """Tell whether a row under these headers can name a component: a name, number or description, and more."""
    return bool(mapping.keys() & {"name", "ref", "description"}) and len(mapping) >= 2
