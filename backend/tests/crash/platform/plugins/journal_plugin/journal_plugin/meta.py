from __future__ import annotations

from typing import Any


def get_plugin_metadata() -> dict[str, Any]:
    return {
        "name": "journal",
        "version": "0.1.0",
        "description": "Has each effect once, however often it is called for a step",
        "module": "journal_plugin.plugin",
        "class": "Journal",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": {},
        "resources": {"requires_gpu": False},
        "idempotent": True,
        "stateless": False,
        "capabilities": ["journal.write", "journal.refuse", "journal.sign"],
    }
