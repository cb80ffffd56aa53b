from __future__ import annotations

from typing import Any


def get_plugin_metadata() -> dict[str, Any]:
    return {
        "name": "fragile",
        "version": "0.1.0",
        "description": "Has effects that must not be repeated",
        "module": "fragile_plugin.plugin",
        "class": "Fragile",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": {},
        "resources": {"requires_gpu": False},
        "idempotent": False,
        "stateless": False,
        "capabilities": ["fragile.append", "fragile.hang"],
    }
