from __future__ import annotations

from typing import Any


def get_plugin_metadata() -> dict[str, Any]:
    return {
        "name": "probe",
        "version": "0.1.0",
        "description": "Does on request what plugins do, good and bad",
        "module": "probe_plugin.plugin",
        "class": "Probe",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": {},
        "resources": {"requires_gpu": False},
        "idempotent": True,
        "stateless": False,
        "capabilities": [
            "probe.echo",
            "probe.fail",
            "probe.usage",
            "probe.make_file",
            "probe.read_file",
            "probe.hold",
            "probe.short",
            "probe.stubborn",
            "probe.journal",
            "probe.die",
            "probe.write",
            "probe.blocked",
            "probe.steered",
            "probe.nonsense",
            "probe.misbehave",
            "probe.remember",
        ],
    }
