"""What the plugin says about itself; importable without its dependencies."""

from __future__ import annotations

from typing import Any

NAME = "bom-reader"
VERSION = "0.1.0"
CONFIG_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "max_components": {
            "type": "integer",
            "minimum": 1,
            "default": 50_000,
            "description": "A bill with more components is refused",
        }
    },
}


def get_plugin_metadata() -> dict[str, Any]:
    """Return the facts that an installer writes into the manifest."""
    return {
        "name": NAME,
        "version": VERSION,
        "description": "Reads bills of materials: CycloneDX JSON and CSV",
        "module": "bom_reader.plugin",
        "class": "BomReader",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": CONFIG_SCHEMA,
        "resources": {"requires_gpu": False},
        "idempotent": True,
        "stateless": True,
        "capabilities": ["bom.read"],
    }
