"""What the installer reads."""

from __future__ import annotations

from typing import Any


def get_plugin_metadata() -> dict[str, Any]:
    """The plugin's own description."""
    return {
        "name": "noop",
        "version": "1.0.0",
        "description": "Does nothing, to measure what surrounds a call",
        "module": "noop_plugin.plugin",
        "class": "NoopPlugin",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": {},
        "resources": {},
        "idempotent": True,
        "stateless": True,
        "capabilities": ["bench.noop"],
    }
