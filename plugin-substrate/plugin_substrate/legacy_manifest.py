"""Manifests of version 1.0: one flat object without ``format_version``, read here as the sections of version 2.0."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from plugin_substrate.manifest_sections import CodeSection, InstallSection

LEGACY_VERSION = "1.0"

_INSTALL_KEYS = frozenset(field.name for field in fields(InstallSection))
_CODE_KEYS = frozenset({"class"} | {field.name for field in fields(CodeSection)} - {"class_name"})


def upgraded(data: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return a legacy object in the form of version 2.0; what is null there stays out.

    The schema's hash was not recorded then. A ``category`` becomes the operator's override, which is what it acts as.
    """
    known = _INSTALL_KEYS | _CODE_KEYS | {"category"}
    problems += [
        f"unknown key {key!r} (without format_version a manifest is of version 1.0, which is flat)"
        for key in data
        if key not in known
    ]
    given = {key: value for key, value in data.items() if value is not None}
    category = given.get("category", "")
    return {
        "format_version": "2.0",
        "install": {key: value for key, value in given.items() if key in _INSTALL_KEYS},
        "code": {key: value for key, value in given.items() if key in _CODE_KEYS},
        "drift_tracking": {"config_schema_hash": None},
        "overrides": {"category_override": category} if category else {},
    }
