"""What the plugin says about itself."""

from __future__ import annotations

from typing import Any


def get_plugin_metadata() -> dict[str, Any]:
    return {
        "name": "forecaster",
        "version": "1.0",
        "description": "Learns from numbers and predicts: scikit-learn",
        "module": "forecaster.plugin",
        "class": "Forecaster",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "trees": {"type": "integer", "minimum": 1, "default": 40},
                "jobs": {"type": "integer", "minimum": 1, "default": 4, "description": "threads of one training"},
            },
        },
        "idempotent": True,
        "capabilities": [
            "forecast.about",
            "forecast.predict",
            "forecast.probabilities",
            "forecast.search",
            "forecast.solve",
            "forecast.standardize",
            "forecast.train",
        ],
    }
