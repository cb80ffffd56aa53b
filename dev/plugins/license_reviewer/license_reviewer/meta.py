"""What the plugin says about itself; importable without its dependencies."""

from __future__ import annotations

from typing import Any

NAME = "license-reviewer"
VERSION = "0.1.0"


def get_plugin_metadata() -> dict[str, Any]:
    """Return the facts that an installer writes into the manifest."""
    return {
        "name": NAME,
        "version": VERSION,
        "description": "Reviews the licenses of a bill of materials",
        "module": "license_reviewer.plugin",
        "class": "LicenseReviewer",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": {},
        "resources": {"requires_gpu": False},
        "idempotent": True,
        "stateless": True,
        "capabilities": ["bom.review"],
    }
