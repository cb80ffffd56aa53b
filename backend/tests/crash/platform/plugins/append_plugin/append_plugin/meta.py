from __future__ import annotations

from typing import Any


def get_plugin_metadata() -> dict[str, Any]:
    return {
        "name": "append",
        "version": "0.1.0",
        "description": "Has its effect again whenever it is called",
        "module": "append_plugin.plugin",
        "class": "Append",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": {},
        "resources": {"requires_gpu": False},
        "idempotent": False,
        "stateless": False,
        "capabilities": ["append.write"],
    }
