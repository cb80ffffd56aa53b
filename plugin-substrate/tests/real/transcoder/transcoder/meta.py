"""What the plugin says about itself."""

from __future__ import annotations

from typing import Any


def get_plugin_metadata() -> dict[str, Any]:
    return {
        "name": "transcoder",
        "version": "1.0",
        "description": "Turns one audio or video format into another: ffmpeg",
        "module": "transcoder.plugin",
        "class": "Transcoder",
        "interface": "plugin_substrate.interface.PluginInterface",
        "isolation": {"processes": 4},
        "idempotent": True,
        "stateless": True,
        "capabilities": ["media.about", "media.audio", "media.endless", "media.video"],
    }
