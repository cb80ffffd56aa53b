"""What the plugin says about itself; importable without its dependencies."""

from __future__ import annotations

from typing import Any

NAME = "report-writer"
VERSION = "0.1.0"


def get_plugin_metadata() -> dict[str, Any]:
    """Return the facts that an installer writes into the manifest. It keeps a journal, so it is not stateless."""
    return {
        "name": NAME,
        "version": VERSION,
        "description": "Writes the report of a bill review and the list of components to stop using",
        "module": "report_writer.plugin",
        "class": "ReportWriter",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": {},
        "resources": {"requires_gpu": False},
        "idempotent": True,
        "stateless": False,
        "capabilities": ["bom.report", "bom.quarantine"],
    }
