"""Reads bills of materials; the plugin class is in `bom_reader.plugin`."""

from __future__ import annotations

__all__: list[str] = []
