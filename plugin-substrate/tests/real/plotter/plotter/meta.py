"""What the plugin says about itself."""

from __future__ import annotations

from typing import Any


def get_plugin_metadata() -> dict[str, Any]:
    return {
        "name": "plotter",
        "version": "1.0",
        "description": "Draws charts as PNG: matplotlib",
        "module": "plotter.plugin",
        "class": "Plotter",
        "interface": "plugin_substrate.interface.PluginInterface",
        "idempotent": True,
        "stateless": True,
        "capabilities": ["plot.about", "plot.lines"],
    }
